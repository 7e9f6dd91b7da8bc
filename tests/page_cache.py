"""What the system has of a file in its memory. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest


def list_in_memory(path: Path) -> list[bool]:
    """For each page of a file whether it is in memory. Asking changes nothing."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages) == 0
    return [bool(page & 1) for page in pages]


def drop_from_memory(path: Path) -> None:
    """Have the system forget what it has of a file; skips a test where it does not, as in a file system in memory."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(list_in_memory(path)):
        pytest.skip("this file system keeps files in memory")
