"""The journal alone: whole transactions or none, whatever happens to the process or the file."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace.core import InputError
from headrace.job.journal import Finished, Journal, Totals, open_journal
from headrace.job.records import Answer, Choice, Failure, Record, Token, Traits

GROUP = 7


def make_row(row: int, key: bytes | None = None, text: str = "yes") -> Finished:
    answer = Answer(10, [Choice(f"{text} {row}", "stop", 3)])
    return Finished(row, Record(f"id {row}", row + 1, answer, 1_700_000_000), key)


def rows_of(path: Path) -> list[int]:
    journal = Journal(path)
    try:
        return [row for row, _ in journal.records()]
    finally:
        journal.close()


def test_what_was_saved_is_read_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    logprobs = [Token("é".encode(), -0.5, [("é".encode(), -0.5), (b"e", -1.0)])]
    rich = Record(
        "x", 1, Answer(2, [Choice("é", "stop", 1, "END", logprobs), Choice("b", "length", 4)]), 5, "/v1", "m", ["w"]
    )
    wrong = Record("", 3, Answer(0, [], Failure("invalid_json", "not JSON")), 5)
    journal.save([make_row(2), Finished(0, rich), Finished(1, wrong)])
    journal.save([make_row(3)])
    assert [(row, record) for row, record in journal.records()][:2] == [(0, rich), (1, wrong)]
    assert journal.finished_between(1, 2) == {1, 2} and journal.finished_between(4, 9) == set()
    assert journal.totals() == Totals(rows=4, failed=1, prompt_tokens=22, output_tokens=11)
    assert journal.traits() == Traits.LOGPROBS | Traits.WARNINGS | Traits.CHOICES | Traits.TEXTS
    assert journal.count_trait(Traits.CHOICES) == 1
    journal.close()


def test_a_row_saved_twice_is_an_error_and_saves_nothing_of_its_group(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.save([make_row(0, text="first")])
    with pytest.raises(sqlite3.IntegrityError):
        journal.save([make_row(1), make_row(0, text="second"), make_row(2)])
    journal.save([make_row(5)])
    assert [record.answer.choices[0].text for _, record in journal.records()] == ["first 0", "yes 5"]


def test_ids_belong_to_the_first_row_that_has_them(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    assert [journal.claim_id("a", 0), journal.claim_id("b", 1), journal.claim_id("a", 2)] == [0, 1, 0]
    journal.save([make_row(0)])
    assert journal.claim_id("c", 3) == 3
    journal.close()
    journal = Journal(path)
    # What was claimed with the save is kept; what came after it was dropped, and may be claimed by any row again.
    assert [journal.claim_id("b", 9), journal.claim_id("a", 0), journal.claim_id("c", 8)] == [1, 0, 8]


def test_equal_rows_find_their_answer(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.save([make_row(0, b"k"), make_row(1, b"k"), make_row(2)])
    assert journal.find_answer(b"k") == make_row(0).record.answer
    assert journal.find_answer(b"other") is None


def test_another_job_is_refused_naming_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    old = {"input": "1" * 64, "model": "m", "max_tokens": 64, "prompt": None}
    journal = open_journal(path, old, fresh=False)
    journal.save([make_row(0)])
    journal.close()
    journal = open_journal(path, dict(old), fresh=False)
    assert journal.totals().rows == 1
    journal.close()
    with pytest.raises(InputError) as caught:
        open_journal(path, old | {"max_tokens": 32, "prompt": "x" * 99, "new": True}, fresh=False)
    message = str(caught.value)
    assert "max_tokens was 64 and is 32; prompt was not set and is " in message
    assert "... (101 characters); new was not set and is true. Use the old settings to go on" in message
    assert "input" not in message and "model" not in message and "\n" not in message
    journal = open_journal(path, {"max_tokens": 32}, fresh=True)
    assert journal.totals().rows == 0 and journal.read_meta("fingerprint") == {"max_tokens": 32}


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text("my notes, which are longer than the header of a database and of value to me\n" * 9)
    with pytest.raises(InputError, match="is not a journal of Headrace"):
        Journal(path)
    assert path.read_text().startswith("my notes")


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version=99")
    database.close()
    with pytest.raises(InputError, match="of another version of Headrace"):
        Journal(path)


def test_a_wal_torn_at_any_byte_holds_whole_groups_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    ends = []
    for group in range(6):
        journal.save([make_row(group * GROUP + each) for each in range(GROUP)])
        ends.append((tmp_path / "journal-wal").stat().st_size)
    torn = tmp_path / "torn"
    torn.mkdir()
    seen = set()
    for length in sorted({*range(0, ends[-1], 997), *ends, *(end - 1 for end in ends)}):
        shutil.copy(tmp_path / "journal", torn / "journal")
        (torn / "journal-wal").write_bytes((tmp_path / "journal-wal").read_bytes()[:length])
        (torn / "journal-shm").unlink(missing_ok=True)
        whole = sum(end <= length for end in ends)
        if length >= ends[0]:
            assert rows_of(torn / "journal") == list(range(whole * GROUP))
            seen.add(whole)
    journal.close()
    assert seen == set(range(1, 7))


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from test_journal import GROUP, make_row
from headrace.job.journal import Journal
journal = Journal(Path(sys.argv[1]))
start = journal.totals().rows
while True:
    journal.save([make_row(start + each) for each in range(GROUP)])
    start += GROUP
    print(start, flush=True)
"""


@pytest.mark.parametrize("delay", [0.003, 0.02, 0.07])
def test_killed_at_any_instant_nothing_acknowledged_is_lost(delay: float, tmp_path: Path) -> None:
    path, known = tmp_path / "journal", 0
    for _ in range(2):
        command = [sys.executable, "-c", WRITER, str(path), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            said = [int(line) for line in (first + process.stdout.read()).splitlines()]
        rows = rows_of(path)
        assert rows == list(range(len(rows)))
        assert len(rows) % GROUP == 0 and len(rows) >= said[-1] > known
        known = len(rows)
