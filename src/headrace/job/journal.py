"""The journal beside the output: which rows are finished and what they said. Knows nothing of engines or formats.

SQLite in WAL mode with synchronous=FULL: a transaction is on the disk before it counts, and a torn one was never there.
A row is inserted, never replaced, so a row that were computed twice would raise an error here.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from headrace.core import InputError
from headrace.job.database import prepare_database
from headrace.job.records import Answer, Record, Traits, find_traits

FORMAT = 1
SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE rows (row INTEGER PRIMARY KEY, record BLOB NOT NULL, failed INTEGER NOT NULL,
                   prompt_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, traits INTEGER NOT NULL);
CREATE TABLE ids (id TEXT PRIMARY KEY, row INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE answers (key BLOB PRIMARY KEY, row INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Finished:
    """A row that is done. `key` is what identical rows share, None where rows may not share an answer."""

    row: int
    record: Record
    key: bytes | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """Of all finished rows, over all runs of the job."""

    rows: int
    failed: int
    prompt_tokens: int
    output_tokens: int


class Journal:
    """One job's journal. Raises InputError for a file that is none, sqlite3.OperationalError when the disk refuses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._database = sqlite3.connect(path, isolation_level=None)
            complaint = f"{path} is of another version of Headrace: finish with that one or give --fresh"
            prepare_database(self._database, SCHEMA, FORMAT, complaint)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path} is not a journal of Headrace ({error}): move it away or give --fresh") from None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Record)

    def read_meta(self, name: str) -> Any:
        """A value kept under this name, or None."""
        found = self._database.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
        return None if found is None else msgspec.json.decode(found[0])

    def write_meta(self, name: str, value: Any) -> None:
        self._database.execute("INSERT OR REPLACE INTO meta VALUES (?,?)", (name, msgspec.json.encode(value)))

    def claim_id(self, row_id: str, row: int) -> int:
        """The row that this id belongs to: this one, unless another row had it first. Kept with the next save."""
        self._begin()
        self._database.execute("INSERT OR IGNORE INTO ids VALUES (?,?)", (row_id, row))
        return int(self._database.execute("SELECT row FROM ids WHERE id=?", (row_id,)).fetchone()[0])

    def find_answer(self, key: bytes) -> Answer | None:
        """What a finished row with this key was answered."""
        query = "SELECT record FROM answers JOIN rows USING (row) WHERE key=?"
        found = self._database.execute(query, (key,)).fetchone()
        return None if found is None else self._decoder.decode(found[0]).answer

    def save(self, finished: Iterable[Finished]) -> None:
        """Record finished rows in one transaction; when this returns they are on the disk."""
        self._begin()
        try:
            for each in finished:
                answer = each.record.answer
                values = (
                    each.row,
                    self._encoder.encode(each.record),
                    int(answer.error is not None),
                    answer.prompt_tokens,
                    answer.output_tokens,
                    int(find_traits(each.record)),
                )
                self._database.execute("INSERT INTO rows VALUES (?,?,?,?,?,?)", values)
                if each.key is not None:
                    self._database.execute("INSERT OR IGNORE INTO answers VALUES (?,?)", (each.key, each.row))
            self._database.execute("COMMIT")
        except sqlite3.Error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def finished_between(self, first: int, last: int) -> set[int]:
        """Which rows from first to last (both counted) are finished."""
        query = "SELECT row FROM rows WHERE row BETWEEN ? AND ?"
        return {row for (row,) in self._database.execute(query, (first, last))}

    def records(self) -> Iterator[tuple[int, Record]]:
        """All finished rows in the order of the input."""
        for row, blob in self._database.execute("SELECT row, record FROM rows ORDER BY row"):
            yield row, self._decoder.decode(blob)

    def totals(self) -> Totals:
        query = "SELECT COUNT(*), TOTAL(failed), TOTAL(prompt_tokens), TOTAL(output_tokens) FROM rows"
        return Totals(*map(int, self._database.execute(query).fetchone()))

    def traits(self) -> Traits:
        """Every trait that some record has."""
        found = Traits(0)
        for (traits,) in self._database.execute("SELECT DISTINCT traits FROM rows"):
            found |= Traits(traits)
        return found

    def count_trait(self, trait: Traits) -> int:
        query = "SELECT COUNT(*) FROM rows WHERE traits & ?"
        return int(self._database.execute(query, (int(trait),)).fetchone()[0])

    def close(self) -> None:
        """Drop what no save has kept and let go of the file."""
        self._database.close()

    def _begin(self) -> None:
        if not self._database.in_transaction:
            self._database.execute("BEGIN IMMEDIATE")


def open_journal(path: Path, fingerprint: dict[str, Any], fresh: bool) -> Journal:
    """The job's journal, begun anew or gone on with.

    Raises InputError, naming every setting that differs, where the journal belongs to another job.
    """
    if fresh:
        remove_journal(path)
    journal = Journal(path)
    known = journal.read_meta("fingerprint")
    if known is None:
        journal.write_meta("fingerprint", fingerprint)
    elif differences := compare(known, fingerprint):
        journal.close()
        raise InputError(
            f"{path} belongs to a run with other settings: {'; '.join(differences)}. "
            "Use the old settings to go on, another output, or --fresh to start anew"
        )
    return journal


def remove_journal(path: Path) -> None:
    # The database last: its WAL must never meet a newer database.
    for suffix in ("-wal", "-shm", ""):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One phrase for each entry of two fingerprints that differs."""
    names = [*old, *(name for name in new if name not in old)]
    pairs = ((name, old.get(name), new.get(name)) for name in names)
    return [f"{name} was {shorten(was)} and is {shorten(now)}" for name, was, now in pairs if was != now]


def shorten(value: object) -> str:
    if value is None:
        return "not set"
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"
