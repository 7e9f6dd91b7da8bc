"""KV blocks on disk, found again by a key that says what is in them. Knows keys and bytes; no tokens, models, tensors.

NAME.blocks holds records of one size end to end and is read through a memory map; NAME.index has an entry for each of
them: its key, when it was used, how long it is, and a checksum of key and bytes. A record is written so: its old entry
is cleared, then its bytes are written, then its new entry. So an entry without its bytes can only come from a disk that
lost power, and then the checksum, which is compared with what was copied and not with what lies on disk, refuses it.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from headrace.cache.folder import BLOCKS, INDEX, count_bytes, hold_folder, make_fit, open_file, remove_oldest, try_lock
from headrace.core import InputError
from headrace.meter.counters import StoreCounts

log = logging.getLogger("headrace")

KEY_BYTES = 32
# Key, time of use, length, checksum of key and bytes; then a checksum of these.
FIELDS = struct.Struct(f"<{KEY_BYTES}sQII")
ENTRY_BYTES = 64
CLEARED = bytes(ENTRY_BYTES)
# Linux reads no more ahead at a time than a disk's read_ahead_kb, which is this by default.
AHEAD_BYTES = 128 << 10


class Entry(NamedTuple):
    key: bytes
    used: int
    length: int
    checksum: int

    def pack(self) -> bytes:
        fields = FIELDS.pack(*self)
        return (fields + struct.pack("<I", zlib.crc32(fields))).ljust(ENTRY_BYTES, b"\0")

    @classmethod
    def unpack(cls, raw: bytes) -> Self | None:
        """None for an entry that is cleared, torn or not there."""
        fields = raw[: FIELDS.size]
        if len(raw) < ENTRY_BYTES or raw[FIELDS.size : FIELDS.size + 4] != struct.pack("<I", zlib.crc32(fields)):
            return None
        entry = cls(*FIELDS.unpack(fields))
        return entry if entry.length else None


class BlockStore:
    """Records of `record_bytes` under this name, 32 hexadecimal digits, in a folder whose stores together take at most
    `most_bytes`.

    When the folder is full, files under other names that nobody writes go first, the oldest first, then the least
    recently used records of this one. The first who opens a name writes; another process that opens it meanwhile reads
    what was there when it did (not `writable`), and nobody waits. When the disk refuses, or others who write have all
    the room, writing ends with a warning.

    Raises InputError for a folder that cannot be used, or a bound that holds no record.
    """

    def __init__(self, folder: Path, name: str, record_bytes: int, most_bytes: int) -> None:
        if most_bytes < record_bytes + ENTRY_BYTES:
            raise InputError(f"kv_dir_bytes of {most_bytes} holds no KV block: one takes {record_bytes + ENTRY_BYTES}")
        self.folder = folder
        self.record_bytes = record_bytes
        self.most_bytes = most_bytes
        self.counts = StoreCounts()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with hold_folder(folder):
                self._index = open_file(folder / f"{name}{INDEX}")
                self.writable = try_lock(self._index)
                if self.writable:
                    make_fit(folder, name, most_bytes)
                self._blocks = open_file(folder / f"{name}{BLOCKS}")
        except OSError as error:
            raise InputError(f"kv_dir {folder} cannot be used: {error.strerror}: name another folder") from error
        self._map: mmap.mmap | None = None
        # Slots in the order in which their records were used, the latest last; those that hold nothing.
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._free: list[int] = []
        self._clock = 0
        self._load()

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def touch(self, keys: Iterable[bytes]) -> None:
        """These records, where they are here, were used now, the last of them latest."""
        for key in keys:
            if key in self._slots:
                self._slots.move_to_end(key)

    def put(self, key: bytes, record: memoryview) -> None:
        """Keep a record, unless it is here or cannot be written. Never raises OSError."""
        if not self.writable or key in self._slots:
            return
        try:
            slot = self._take_slot()
            write_all(self._blocks, record, slot * self.record_bytes)
            checksum = zlib.crc32(record, zlib.crc32(key))
            entry = Entry(key, self._clock, self.record_bytes, checksum)
            write_all(self._index, memoryview(entry.pack()), slot * ENTRY_BYTES)
        except OSError as error:
            self._end_writing(error)
            return
        self._slots[key] = slot
        self._clock += 1
        self.counts.blocks_written += 1
        self.counts.bytes_written += self.record_bytes

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Have the system read these records from the disk, those that are here, and do not wait for it.

        Nothing depends on whether it does.
        """
        if sys.platform != "linux":
            return
        for key in keys:
            slot = self._slots.get(key)
            begin, end = (0, 0) if slot is None else (slot * self.record_bytes, (slot + 1) * self.record_bytes)
            for start in range(begin, end, AHEAD_BYTES):
                with suppress(OSError):
                    os.posix_fadvise(self._blocks, start, min(AHEAD_BYTES, end - start), os.POSIX_FADV_WILLNEED)

    def read(self, key: bytes, into: memoryview) -> bool:
        """Copy a record to where it is wanted. False if it is not here or cannot be read; `into` then holds anything.

        Never raises OSError.
        """
        try:
            found = self._copy(key, into)
        except OSError as error:
            self._end_writing(error)
            found = False
        if not found:
            self._slots.pop(key, None)
            return False
        self._slots.move_to_end(key)
        self.counts.blocks_read += 1
        self.counts.bytes_read += self.record_bytes
        return True

    def close(self) -> None:
        """Write down in which order the records were used, and let go of the files. May be called again."""
        if self._index < 0:
            return
        if self.writable:
            # A disk that refuses this loses the order only.
            with suppress(OSError):
                self._note_order()
        os.close(self._index)
        os.close(self._blocks)
        self._slots, self._map, self.writable = OrderedDict(), None, False
        self._index = self._blocks = -1

    def _end_writing(self, error: OSError) -> None:
        """Say why, once; what is here can still be read."""
        if self.writable:
            log.warning("no more KV blocks are written to %s, and the run goes on: %s", self.folder, error.strerror)
        self.writable = False

    def _note_order(self) -> None:
        for used, slot in enumerate(self._slots.values()):
            entry = self._read_entry(slot)
            if entry is not None:
                os.pwrite(self._index, entry._replace(used=used).pack(), slot * ENTRY_BYTES)

    def _load(self) -> None:
        raw = os.pread(self._index, os.fstat(self._index).st_size, 0)
        found: list[tuple[Entry, int]] = []
        for slot in range(os.fstat(self._blocks).st_size // self.record_bytes):
            entry = Entry.unpack(raw[slot * ENTRY_BYTES : (slot + 1) * ENTRY_BYTES])
            if entry is None or entry.length != self.record_bytes:
                self._free.append(slot)
            else:
                found.append((entry, slot))
        for entry, slot in sorted(found, key=lambda each: each[0].used):
            self._slots[entry.key] = slot
            self._clock = entry.used + 1

    def _take_slot(self) -> int:
        """A slot whose entry is cleared: free, new within the bound, or the least recently used. Raises OSError."""
        if self._free:
            return self._free.pop()
        slot = self._grow()
        if slot is None:
            if not self._slots:
                raise OSError(errno.ENOSPC, "other models hold all of kv_dir_bytes: raise it, or name another folder")
            _, slot = self._slots.popitem(last=False)
            os.pwrite(self._index, CLEARED, slot * ENTRY_BYTES)
        return slot

    def _grow(self) -> int | None:
        """One slot more, if the folder has room for it. Its bytes count from now on, whoever else looks."""
        with hold_folder(self.folder):
            room = self.most_bytes - count_bytes(self.folder) - self.record_bytes - ENTRY_BYTES
            if room < 0 and not remove_oldest(self.folder, -room):
                return None
            slot = os.fstat(self._blocks).st_size // self.record_bytes
            os.ftruncate(self._blocks, (slot + 1) * self.record_bytes)
            os.ftruncate(self._index, (slot + 1) * ENTRY_BYTES)
            return slot

    def _read_entry(self, slot: int) -> Entry | None:
        return Entry.unpack(os.pread(self._index, ENTRY_BYTES, slot * ENTRY_BYTES))

    def _mapped(self, length: int) -> mmap.mmap:
        """The records' file, mapped at least so far."""
        if self._map is None or len(self._map) < length:
            self._map = mmap.mmap(self._blocks, 0, access=mmap.ACCESS_READ)
        return self._map

    def _copy(self, key: bytes, into: memoryview) -> bool:
        slot = self._slots.get(key)
        entry = None if slot is None else self._read_entry(slot)
        if slot is None or entry is None or entry.key != key:
            return False
        start = slot * self.record_bytes
        with memoryview(self._mapped(start + self.record_bytes)) as mapped:
            into[:] = mapped[start : start + self.record_bytes]
        if zlib.crc32(into, zlib.crc32(key)) == entry.checksum:
            return True
        # The bytes are not those of the entry. A reader may only have been too slow; a writer clears the entry.
        self.counts.blocks_refused += 1
        if self.writable:
            os.pwrite(self._index, CLEARED, slot * ENTRY_BYTES)
            self._free.append(slot)
        return False


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """os.pwrite may write less than it was given: a full disk then says so at the next try."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
