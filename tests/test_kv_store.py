"""KV blocks on disk: what is read is what was written, whatever ends the writer, and the folder keeps its bound."""

from __future__ import annotations

import json
import logging
import mmap
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from page_cache import drop_from_memory, list_in_memory
from store_killer import make_key

from headrace.cache.store import ENTRY_BYTES, BlockStore
from headrace.core import InputError

RECORD = 1000
SLOT = RECORD + ENTRY_BYTES
# Names of stores, as they are in a folder.
NAME, OTHER, LATE = "b0" * 16, "07" * 16, "1a" * 16
TESTS = Path(__file__).parent


def open_store(folder: Path, slots: int = 4, name: str = NAME) -> BlockStore:
    return BlockStore(folder, name, RECORD, slots * SLOT)


def record(number: int) -> memoryview:
    return memoryview(random.Random(number).randbytes(RECORD))


def read(store: BlockStore, number: int) -> memoryview | None:
    into = memoryview(bytearray(RECORD))
    return into if store.read(make_key(number), into) else None


def put(store: BlockStore, *numbers: int) -> None:
    for number in numbers:
        store.put(make_key(number), record(number))


def count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def held(store: BlockStore, numbers: range) -> list[int]:
    return [number for number in numbers if make_key(number) in store]


def abandon(store: BlockStore) -> None:
    """As if its process were killed: what it wrote is there, the order of uses is not, and its lock is gone."""
    os.close(store._index)


def test_records_come_back_after_reopening_and_the_least_recently_used_went(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, 0, 1, 2, 3)
    assert read(store, 0) == record(0)
    put(store, 4)
    assert held(store, range(6)) == [0, 2, 3, 4]
    store.touch([make_key(2), make_key(9)])
    store.close()
    again = open_store(tmp_path)
    put(again, 5, 6)
    assert held(again, range(7)) == [2, 4, 5, 6]
    assert [read(again, number) == record(number) for number in (2, 5, 6)] == [True] * 3
    assert read(again, 3) is None
    assert (again.counts.blocks_read, again.counts.bytes_read, again.counts.blocks_written) == (3, 3 * RECORD, 2)
    again.close()
    again.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the system cannot be asked to read ahead")
def test_what_is_prefetched_is_in_memory_soon_and_nothing_else(tmp_path: Path) -> None:
    size = 300_000
    store = BlockStore(tmp_path, NAME, size, 1 << 30)
    for number in range(9):
        store.put(make_key(number), memoryview(random.Random(number).randbytes(size)))
    path = tmp_path / f"{NAME}.blocks"
    drop_from_memory(path)
    store.prefetch([make_key(5), make_key(77)])
    pages = range(5 * size // mmap.PAGESIZE + 1, 6 * size // mmap.PAGESIZE)
    patience = time.monotonic() + 60
    while not all(list_in_memory(path)[page] for page in pages) and time.monotonic() < patience:
        time.sleep(0.01)
    found = list_in_memory(path)
    assert all(found[page] for page in pages)
    assert not any(found[: pages[0] - 70]) and not any(found[pages[-1] + 70 :])
    store.close()


def test_any_order_of_uses_gives_right_bytes_and_keeps_the_bound(tmp_path: Path) -> None:
    source = random.Random(3)
    for _ in range(20):
        slots = source.randrange(1, 7)
        store = open_store(tmp_path, slots)
        for _ in range(60):
            number = source.randrange(12)
            if source.random() < 0.5:
                put(store, number)
                assert read(store, number) == record(number)
            else:
                found = read(store, number)
                assert found is None or found == record(number)
            assert count_bytes(tmp_path) <= slots * SLOT
        assert len(store) <= slots
        if source.random() < 0.7:
            store.close()
        else:
            abandon(store)


def test_a_second_process_reads_and_never_gets_other_bytes(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    put(first, 0, 1)
    second = open_store(tmp_path)
    assert (first.writable, second.writable) == (True, False)
    put(second, 7)
    assert 7 not in held(second, range(9)) and read(second, 0) == record(0)
    put(first, 2, 3, 4, 5)
    found = [read(second, number) for number in range(2)]
    assert found == [None, None] and second.counts.blocks_refused == 0
    first.close()
    third = open_store(tmp_path)
    assert third.writable and held(third, range(9)) == [2, 3, 4, 5]


def test_files_of_others_go_first_unless_they_are_in_use(tmp_path: Path) -> None:
    used, unused = open_store(tmp_path, 6), open_store(tmp_path, 6, OTHER)
    put(used, 0, 1)
    put(unused, 0, 1)
    unused.close()
    store = open_store(tmp_path, 6, LATE)
    put(store, 2, 3)
    assert (tmp_path / f"{OTHER}.blocks").exists()
    put(store, 4, 5, 6)
    assert not list(tmp_path.glob(f"{OTHER}.*"))
    assert held(store, range(9)) == [3, 4, 5, 6] and read(used, 1) == record(1)
    assert count_bytes(tmp_path) <= 6 * SLOT


def test_a_folder_that_others_fill_is_said_once_and_asked_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = open_store(tmp_path, 3), open_store(tmp_path, 3, OTHER)
    put(first, 0, 1, 2)
    with caplog.at_level(logging.WARNING, logger="headrace"):
        put(second, 5)
        # Whoever asks the folder for room makes it anew.
        (tmp_path / "lock").unlink()
        put(second, 6, 7)
    assert len(second) == 0 and not second.writable and not (tmp_path / "lock").exists()
    assert len(caplog.records) == 1 and "other models hold all of kv_dir_bytes: raise it" in caplog.text
    put(first, 3)
    assert held(first, range(9)) == [1, 2, 3] and count_bytes(tmp_path) <= 3 * SLOT


def test_files_of_somebody_else_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    names = ["my-city.blocks", "my-city.index", f"{NAME[:-1]}.blocks", f"{NAME}0.index", f"{NAME}.blocks.bak"]
    for name in names:
        (tmp_path / name).write_bytes(bytes(9 * SLOT))
    for name in (OTHER, NAME):
        store = open_store(tmp_path, 3, name)
        put(store, 0, 1, 2, 3)
        assert held(store, range(9)) == [1, 2, 3]
        store.close()
    open_store(tmp_path, 2).close()
    assert all((tmp_path / name).stat().st_size == 9 * SLOT for name in names)


def test_a_lower_bound_holds_from_the_start(tmp_path: Path) -> None:
    for name in (OTHER, NAME):
        store = open_store(tmp_path, 8, name)
        put(store, 0, 1, 2, 3)
        store.close()
    store = open_store(tmp_path, 5)
    assert len(store) == 4 and count_bytes(tmp_path) <= 5 * SLOT
    store.close()
    store = open_store(tmp_path, 3)
    assert len(store) == 0
    put(store, 0, 1, 2, 3)
    assert held(store, range(4)) == [1, 2, 3] and count_bytes(tmp_path) <= 3 * SLOT


@pytest.mark.parametrize("damage", ["first byte", "last byte", "lost", "another's"])
def test_bytes_that_are_not_those_of_the_entry_are_refused(tmp_path: Path, damage: str) -> None:
    store = open_store(tmp_path)
    put(store, 0, 1)
    store.close()
    blocks = bytearray((tmp_path / f"{NAME}.blocks").read_bytes())
    if damage == "another's":
        blocks[:RECORD] = blocks[RECORD:]
    elif damage == "lost":
        blocks[RECORD // 2 : RECORD] = bytes(RECORD // 2)
    else:
        blocks[0 if damage == "first byte" else RECORD - 1] ^= 1
    (tmp_path / f"{NAME}.blocks").write_bytes(blocks)
    store = open_store(tmp_path)
    assert read(store, 0) is None and store.counts.blocks_refused == 1
    assert held(store, range(2)) == [1] and read(store, 1) == record(1)
    store.close()
    store = open_store(tmp_path)
    assert held(store, range(2)) == [1]
    put(store, 0)
    assert read(store, 0) == record(0) and count_bytes(tmp_path) == 2 * SLOT


@pytest.mark.parametrize("fault", ["a disk that takes no writes", "a disk that cannot be read"])
def test_a_disk_that_fails_where_it_is_read_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    store = open_store(tmp_path)
    put(store, 0, 1, 2)
    with (tmp_path / f"{NAME}.blocks").open("r+b") as blocks:
        blocks.write(bytes(2 * RECORD))
    limits, index = resource.getrlimit(resource.RLIMIT_FSIZE), os.dup(store._index)
    if fault == "a disk that takes no writes":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    else:
        folder = os.open(tmp_path, os.O_RDONLY)
        os.dup2(folder, store._index)
        os.close(folder)
    try:
        with caplog.at_level(logging.WARNING, logger="headrace"):
            assert read(store, 0) is None and read(store, 1) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        os.dup2(index, store._index)
    assert len(caplog.records) == 1 and str(tmp_path) in caplog.text and not store.writable
    assert held(store, range(3)) == [2] and read(store, 2) == record(2)


def test_a_torn_entry_is_no_entry(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, 0, 1, 2)
    store.close()
    index = tmp_path / f"{NAME}.index"
    whole = index.read_bytes()
    for place in range(ENTRY_BYTES - 12):
        torn = bytearray(whole)
        torn[ENTRY_BYTES + place] ^= 0x55
        index.write_bytes(torn)
        store = open_store(tmp_path)
        assert held(store, range(3)) == [0, 2], place
        abandon(store)
    index.write_bytes(whole[: 2 * ENTRY_BYTES + 10])
    assert held(open_store(tmp_path), range(3)) == [0, 1]


def test_a_killed_writer_leaves_no_torn_record(tmp_path: Path) -> None:
    program = [sys.executable, str(TESTS / "store_killer.py"), str(tmp_path), "60"]
    found = json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    assert found["killed"] == 60 and found["whole"] > 200
    assert found["wrong"] == 0 and found.get("refused", 0) == 0


def test_a_full_disk_is_said_once_and_the_rest_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(tmp_path, 20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * RECORD + 10, limits[1]))
    try:
        with caplog.at_level(logging.WARNING, logger="headrace"):
            put(store, *range(8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caplog.records) == 1 and str(tmp_path) in caplog.text
    assert held(store, range(8)) == [0, 1, 2]
    assert [read(store, number) == record(number) for number in range(3)] == [True] * 3
    put(store, 9)
    assert not store.writable and len(caplog.records) == 1
    store.close()
    assert held(open_store(tmp_path, 20), range(8)) == [0, 1, 2]


def test_what_cannot_work_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kv_dir_bytes of 10 holds no KV block"):
        BlockStore(tmp_path, NAME, RECORD, 10)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name another folder"):
        open_store(tmp_path / "file")


def test_the_store_loads_without_torch() -> None:
    code = "import sys, headrace.cache.store; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
