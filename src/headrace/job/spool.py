"""Standard input as a file beside the output, for it is read twice, and again by a run that goes on."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.core import InputError
from headrace.job.sources import hash_file


@contextmanager
def spool_input(output: Path, fresh: bool) -> Iterator[Path]:
    """Standard input as OUTPUT.input, for the block that opens the job. Raises InputError where it is not what is kept.

    A job that is refused leaves no rows of its own beside another job's journal: there that job's rows belong.
    """
    spool, journal = Path(f"{output}.input"), Path(f"{output}.journal")
    new = keep_input(spool, going_on=journal.exists() and not fresh)
    try:
        yield spool
    except BaseException:
        if new and journal.exists():
            spool.unlink()
        raise


def keep_input(spool: Path, going_on: bool) -> bool:
    """Write standard input to the spool, unless what it has goes on: where the input is the same, or empty. Whether it
    was written."""
    part = spool.with_name(f"{spool.name}.part")
    with part.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 2**20)
        file.flush()
        os.fsync(file.fileno())
    empty = part.stat().st_size == 0
    if spool.exists() and (empty or going_on):
        same = empty or hash_file(part) == hash_file(spool)
        part.unlink()
        if not same:
            raise InputError(
                f"standard input is not what {spool} has kept of the run before: "
                "give the same rows to go on, another output, or --fresh to start anew"
            )
        return False
    if empty:
        part.unlink()
        raise InputError("standard input is empty: there is no row to answer")
    part.replace(spool)
    return True
