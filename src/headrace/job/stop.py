"""How a job ends early: Ctrl-C, too many errors, a disk that refuses. And the lock that keeps two runs apart."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from headrace.core import HeadraceError, InputError

TOO_MANY_ERRORS, DISK, INTERRUPTED = 1, 3, 130
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
NOTICE = b"\nheadrace: finishing this step and saving; press Ctrl-C again to stop at once\n"


class JobStopped(HeadraceError):
    """The job ended before its last row; all finished rows are in the journal.

    Exit codes: 1 too many failed rows, 3 the disk refused, 130 interrupted.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopSignals:
    """While open, the first SIGINT or SIGTERM sets `requested`; the second ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            # The journal is whole at every instant, so nothing needs to be put in order.
            os._exit(INTERRUPTED)
        self.requested = True
        # What read it, such as `2>&1 | tee`, may have died of the same Ctrl-C.
        with suppress(OSError):
            os.write(2, NOTICE)


def print_to_stderr(text: str) -> None:
    """A line for the user. Where nobody reads any more, nothing that is printed fails from then on, at exit neither."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@contextmanager
def lock_output(output: Path) -> Iterator[None]:
    """Hold OUTPUT.lock, with this process's id in it. Raises InputError while another run holds it."""
    path = Path(f"{output}.lock")
    descriptor = take_lock(path, output)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def take_lock(path: Path, output: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            message = f"another run (process {holder}) is writing {output}: wait for it, or choose another output"
            raise InputError(message) from None
        # The run before may have removed the file between our open and our lock: then we hold a lock on nothing.
        try:
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


@contextmanager
def explain_disk_errors(output: Path) -> Iterator[None]:
    """Turn a full or read-only disk, or a locked journal, into one line that says what is safe and what to do."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
            raise
        place, reason = f"cannot write beside {output}", str(error)
        remedy = "make room or make the folder writable"
        if isinstance(error, OSError):
            place = place if error.filename is None else f"cannot read or write {error.filename}"
            reason = str(error.strerror)
        elif "locked" in reason:
            place, remedy = f"another program holds {output}.journal", "end that program"
        message = (
            f"{place}: {reason.lower()}. Rows finished until now are safe in {output}.journal; "
            f"{remedy}, then run the same command again"
        )
        raise JobStopped(message, DISK) from error
