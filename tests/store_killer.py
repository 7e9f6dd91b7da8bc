"""Kill a writer of a block store with SIGKILL at random instants, and read everything after each. A program of its own.

Prints a JSON object: how often it was killed, how many records were read whole, how many were refused, how many wrong.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from hashlib import blake2b, shake_128
from pathlib import Path

from headrace.cache.store import KEY_BYTES, BlockStore

RECORD_BYTES = 50_000
SLOTS = 8
RECORDS = 40


def make_key(number: int) -> bytes:
    return blake2b(str(number).encode(), digest_size=KEY_BYTES).digest()


def make_record(key: bytes) -> memoryview:
    """The bytes that belong to a key."""
    return memoryview(shake_128(key).digest(RECORD_BYTES))


def open_store(folder: Path) -> BlockStore:
    return BlockStore(folder, "0" * 32, RECORD_BYTES, SLOTS * (RECORD_BYTES + 64))


def write(folder: Path, seed: int) -> None:
    """In the fork: write until killed."""
    source = random.Random(seed)
    store = open_store(folder)
    while True:
        key = make_key(source.randrange(RECORDS))
        store.put(key, make_record(key))


def main(folder: Path, kills: int) -> None:
    source_of_delays = random.Random(11)
    found: Counter[str] = Counter()
    for seed in range(kills):
        child = os.fork()
        if child == 0:
            write(folder, seed)
        time.sleep(source_of_delays.uniform(0.001, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        store = open_store(folder)
        for number in range(RECORDS):
            key, into = make_key(number), memoryview(bytearray(RECORD_BYTES))
            if key in store:
                whole = store.read(key, into)
                found["whole" if whole else "refused"] += 1
                found["wrong"] += whole and into != make_record(key)
        store.close()
    print(json.dumps({"killed": kills, **found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
