"""How many texts a memory holds under a layout, asked of the ledger that would keep them. Knows no policy."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.cache.layout import CacheLayout
from headrace.cache.ledger import KVLedger
from headrace.core import Chunk
from headrace.judge.driver import open_sequence, settle


@dataclass(frozen=True, slots=True)
class Room:
    """Most blocks that one text holds: while its context is computed, and from then on."""

    context: int
    after: int


def find_room(layout: CacheLayout, context: int, tail: int, chunk: int) -> Room:
    """Walk a text of context + tail tokens through a ledger: its context in chunks, then a token a step."""
    ledger = KVLedger(layout, layout.count_blocks(context + tail), prefix_cache=False)
    sequence = open_sequence(ledger, [0] * context, 0)

    def compute(length: int) -> int:
        ledger.grow(sequence, sequence.computed + length)
        used = ledger.used_blocks
        settle(ledger, Chunk(0, sequence.computed, length), sequence)
        return used

    most = 0
    while sequence.computed < context:
        most = max(most, compute(layout.cut_chunk(context, sequence.computed, min(context - sequence.computed, chunk))))
    return Room(most, max(compute(1) for _ in range(tail)))


def count_batch(layout: CacheLayout, context: int, tail: int, chunk: int, memory: int) -> int:
    """The most contexts, each with `tail` tokens after it, that so many bytes hold, one being computed at a time."""
    room = find_room(layout, context, tail, chunk)
    left = memory // layout.block_bytes - max(room.context, room.after)
    return 0 if left < 0 else 1 + left // room.after
