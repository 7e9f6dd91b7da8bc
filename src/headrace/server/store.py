"""The data folder of a server: files, and what is known of batches, durable at every instant. Knows no row and no HTTP.

    server.sqlite     descriptions, in WAL mode with synchronous=FULL: a change is on the disk before it counts
    files/ID          contents, complete or not there; one that no description names was never listed
    batches/ID.*      the journals of batches that are not finished

An owner never sees what another one has. May be called from any thread.
"""

from __future__ import annotations

import errno
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from headrace.core import InputError
from headrace.job.database import prepare_database
from headrace.job.results import flush_folder, replace_file
from headrace.job.stop import lock_output
from headrace.server.batch_object import Batch, FileObject
from headrace.server.errors import ApiError

FORMAT = 1
SCHEMA = """
CREATE TABLE files (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
                    purpose TEXT NOT NULL, expires_at INTEGER, object BLOB NOT NULL);
CREATE TABLE batches (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
                      input TEXT NOT NULL, status TEXT NOT NULL, unfinished INTEGER NOT NULL, object BLOB NOT NULL);
CREATE INDEX unfinished_batches ON batches (input) WHERE unfinished;
"""
LIVING = "(expires_at IS NULL OR expires_at > :now)"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
COPIED = 2**20


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is wanted: so many after the one with this id, newest first unless `ascending`."""

    limit: int
    after: str | None = None
    ascending: bool = False


class Store:
    """Raises InputError for a folder that another process holds, or that is no data folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held = ExitStack()
        self._guard = threading.Lock()
        try:
            for each in (folder, folder / "files", folder / "batches"):
                each.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(hold_folder(folder))
            self._database = sqlite3.connect(folder / "server.sqlite", isolation_level=None, check_same_thread=False)
            self._held.callback(self._database.close)
            prepare_database(
                self._database, SCHEMA, FORMAT, f"{folder} is of another version of Headrace: choose another folder"
            )
            self._sweep()
        except (OSError, sqlite3.Error) as error:
            self._held.close()
            raise InputError(f"{folder} cannot hold a server's data ({error}): choose another folder") from None
        except BaseException:
            self._held.close()
            raise

    def close(self) -> None:
        with self._guard:
            self._held.close()

    # Files.

    def path_of(self, file_id: str) -> Path:
        """Where the contents of a known file are."""
        return self.folder / "files" / file_id

    def add_file(self, file: FileObject, source: IO[bytes]) -> None:
        """Keep what can be read from `source`. Raises ApiError 507 where the disk is full; nothing is left then."""
        path = self.path_of(file.id)
        with refuse_full_disk():
            with replace_file(path, "wb") as target:
                shutil.copyfileobj(source, target, COPIED)
            try:
                with self._change() as database:
                    insert_file(database, file)
            except BaseException:
                path.unlink()
                raise

    def find_file(self, owner: str, file_id: str) -> FileObject:
        """Raises ApiError 404."""
        query = f"SELECT object FROM files WHERE id=:id AND owner=:owner AND {LIVING}"
        found = self._read(query, {"id": file_id, "owner": owner, "now": now()})
        if not found:
            raise missing("file", file_id)
        return msgspec.json.decode(found[0][0], type=FileObject)

    def list_files(self, owner: str, page: Page, purpose: str | None) -> tuple[list[FileObject], bool]:
        """A page of an owner's files, and whether there are more. Raises ApiError for an `after` that is not there."""
        where = f"{LIVING} AND (:purpose IS NULL OR purpose=:purpose)"
        blobs, more = self._list("files", where, {"owner": owner, "now": now(), "purpose": purpose}, page)
        return [msgspec.json.decode(blob, type=FileObject) for blob in blobs], more

    def remove_file(self, owner: str, file_id: str) -> None:
        """Raises ApiError 404, and 409 while a batch needs the file."""
        self.find_file(owner, file_id)
        with refuse_full_disk(), self._change() as database:
            query = "SELECT id FROM batches WHERE unfinished AND input=?"
            user = database.execute(query, (file_id,)).fetchone()
            if user is not None:
                raise ApiError(409, "file_in_use", f"{file_id} is the input of {user[0]}, which is not finished")
            database.execute("DELETE FROM files WHERE id=?", (file_id,))
        self.path_of(file_id).unlink(missing_ok=True)

    def remove_expired(self) -> None:
        """Forget files that have expired, unless a batch still needs them."""
        with self._change() as database:
            query = (
                f"SELECT id FROM files WHERE NOT {LIVING} AND id NOT IN (SELECT input FROM batches WHERE unfinished)"
            )
            old = [file_id for (file_id,) in database.execute(query, {"now": now()})]
            database.executemany("DELETE FROM files WHERE id=?", [(file_id,) for file_id in old])
        for file_id in old:
            self.path_of(file_id).unlink(missing_ok=True)

    # Batches.

    def journal_of(self, batch_id: str) -> Path:
        """Where the journal of an unfinished batch is."""
        return self.folder / "batches" / f"{batch_id}.journal"

    def add_batch(self, batch: Batch) -> None:
        """Raises ApiError 404 where its input file has gone meanwhile, 507 where the disk is full."""
        with refuse_full_disk(), self._change() as database:
            if database.execute("SELECT 1 FROM files WHERE id=?", (batch.input_file_id,)).fetchone() is None:
                raise missing("file", batch.input_file_id)
            query = "INSERT INTO batches (id, owner, input, status, unfinished, object) VALUES (?,?,?,?,1,?)"
            values = (batch.id, batch.owner, batch.input_file_id, batch.status, msgspec.json.encode(batch))
            database.execute(query, values)

    def find_batch(self, owner: str | None, batch_id: str) -> Batch:
        """An owner's batch, or anybody's for None. Raises ApiError 404."""
        query = "SELECT object FROM batches WHERE id=:id AND (:owner IS NULL OR owner=:owner)"
        found = self._read(query, {"id": batch_id, "owner": owner})
        if not found:
            raise missing("batch", batch_id)
        return msgspec.json.decode(found[0][0], type=Batch)

    def list_batches(self, owner: str | None, page: Page) -> tuple[list[Batch], bool]:
        """A page of an owner's batches, or of all for None. Raises ApiError for an `after` that is not there."""
        blobs, more = self._list("batches", "TRUE", {"owner": owner}, page)
        return [msgspec.json.decode(blob, type=Batch) for blob in blobs], more

    def unfinished_batches(self) -> list[Batch]:
        """In the order in which they came."""
        found = self._read("SELECT object FROM batches WHERE unfinished ORDER BY number", {})
        return [msgspec.json.decode(blob, type=Batch) for (blob,) in found]

    def count_batches(self) -> dict[str, int]:
        """How many batches have which status."""
        found = self._read("SELECT status, COUNT(*) FROM batches GROUP BY status", {})
        return {status: number for status, number in found}

    def change_batch(
        self, batch_id: str, change: Callable[[Batch], Batch], outputs: dict[str, tuple[FileObject, Path]] | None = None
    ) -> Batch:
        """Put what `change` makes of a batch in its place; what it is now.

        `outputs` are contents that become files with it, all or none, and the fields of the batch that name them.
        """
        outputs = outputs or {}
        for file, path in outputs.values():
            path.replace(self.path_of(file.id))
        if outputs:
            flush_folder(self.folder / "files")
        with self._change() as database:
            blob = database.execute("SELECT object FROM batches WHERE id=?", (batch_id,)).fetchone()[0]
            batch = change(msgspec.json.decode(blob, type=Batch))
            names = {field: file.id for field, (file, _) in outputs.items()}
            batch = msgspec.structs.replace(batch, **names)
            for file, _ in outputs.values():
                insert_file(database, file)
            query = "UPDATE batches SET status=?, unfinished=?, object=? WHERE id=?"
            database.execute(query, (batch.status, batch.unfinished, msgspec.json.encode(batch), batch_id))
        return batch

    # The disk.

    def _sweep(self) -> None:
        """Remove what a process that was killed had not finished, or had not yet removed."""
        self.remove_expired()
        known = {file_id for (file_id,) in self._read("SELECT id FROM files", {})}
        for path in (self.folder / "files").iterdir():
            if path.name not in known:
                path.unlink()
        unfinished = {batch.id for batch in self.unfinished_batches()}
        for path in (self.folder / "batches").iterdir():
            if path.name.split(".")[0] not in unfinished:
                path.unlink()

    def _read(self, query: str, values: dict[str, Any]) -> list[tuple[Any, ...]]:
        with self._guard:
            return self._database.execute(query, values).fetchall()

    def _list(self, table: str, where: str, values: dict[str, Any], page: Page) -> tuple[list[bytes], bool]:
        where = f"(:owner IS NULL OR owner=:owner) AND {where}"
        order = ""
        if page.after is not None:
            place = self._read(
                f"SELECT number FROM {table} WHERE id=:after AND {where}", values | {"after": page.after}
            )
            if not place:
                raise ApiError(400, "invalid_value", f"after is {page.after!r:.80}, which is not in the list", "after")
            values = values | {"place": place[0][0]}
            order = f"AND number {'>' if page.ascending else '<'} :place "
        order += f"ORDER BY number {'' if page.ascending else 'DESC'} LIMIT :limit"
        query = f"SELECT object FROM {table} WHERE {where} {order}"
        found = self._read(query, values | {"limit": page.limit + 1})
        return [blob for (blob,) in found[: page.limit]], len(found) > page.limit

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction, on the disk when the block has ended."""
        with self._guard:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other servers out of the folder. Raises InputError where there is one."""
    with ExitStack() as held:
        try:
            held.enter_context(lock_output(folder / "server"))
        except InputError:
            holder = (folder / "server.lock").read_text().strip()
            message = f"{folder} is in use by another server (process {holder}): stop it, or choose another folder"
            raise InputError(message) from None
        yield


@contextmanager
def refuse_full_disk() -> Iterator[None]:
    """Turn a full disk into ApiError 507."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if not is_disk_full(error):
            raise
        message = "the server's disk is full, and nothing was kept: remove files that are not needed, or ask its owner"
        raise ApiError(507, "insufficient_storage", message) from error


def is_disk_full(error: BaseException) -> bool:
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
    return isinstance(error, OSError) and error.errno in FULL


def insert_file(database: sqlite3.Connection, file: FileObject) -> None:
    query = "INSERT INTO files (id, owner, purpose, expires_at, object) VALUES (?,?,?,?,?)"
    database.execute(query, (file.id, file.owner, file.purpose, file.expires_at, msgspec.json.encode(file)))


def make_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}{secrets.token_hex(12)}"


def missing(kind: str, name: str) -> ApiError:
    return ApiError(404, f"{kind}_not_found", f"there is no {kind} {name!r:.80}")


def now() -> int:
    return int(time.time())
