"""The folder that block stores share: which files are theirs, who writes them, and the bound of all together."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BLOCKS, INDEX = ".blocks", ".index"
NAME = re.compile("[0-9a-f]{32}")


def open_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def try_lock(descriptor: int) -> bool:
    """Take the lock of an open file until it is closed; False if another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """While files are made, grow or go, one process at a time. Held for microseconds."""
    descriptor = open_file(folder / "lock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def list_files(folder: Path, *suffixes: str) -> list[Path]:
    """The files of stores; whatever else lies in the folder is somebody else's."""
    return [each for each in folder.iterdir() if each.suffix in suffixes and NAME.fullmatch(each.stem)]


def count_bytes(folder: Path) -> int:
    return sum(each.stat().st_size for each in list_files(folder, BLOCKS, INDEX))


def make_fit(folder: Path, name: str, most_bytes: int) -> None:
    """Bring a folder whose bound was lowered within it. Readers may have a file mapped, so none is made shorter."""
    own = folder / f"{name}{BLOCKS}"
    if own.exists() and own.stat().st_size + own.with_suffix(INDEX).stat().st_size > most_bytes:
        own.unlink()
        os.truncate(own.with_suffix(INDEX), 0)
    excess = count_bytes(folder) - most_bytes
    if excess > 0:
        remove_oldest(folder, excess)


def remove_oldest(folder: Path, needed: int) -> bool:
    """Remove files that nobody writes, the oldest first, until so many bytes are gone; False if they were too few."""
    for blocks in sorted(list_files(folder, BLOCKS), key=lambda each: each.stat().st_mtime):
        index = blocks.with_suffix(INDEX)
        descriptor = open_file(index)
        if try_lock(descriptor):
            needed -= blocks.stat().st_size + index.stat().st_size
            blocks.unlink()
            index.unlink()
        os.close(descriptor)
        if needed <= 0:
            return True
    return False
