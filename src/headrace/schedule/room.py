"""What a plan may still take of the pool: blocks as they will be when what it has decided so far is done.

Knows nothing of why a plan takes or gives back; changes no state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from headrace.cache.ledger import KVLedger
from headrace.cache.prefix import ABSENT
from headrace.core import Sequence


class Room:
    """`free` blocks can be had. It is below 0 while what is claimed must still be made room for."""

    def __init__(self, ledger: KVLedger) -> None:
        self.layout = ledger.layout
        self.free = ledger.free_blocks
        self._references = ledger.pool.references
        # Holders that blocks gain or lose by the plan.
        self._changes: Counter[int] = Counter()

    def fitting(self, computed: int, blocks: int) -> int:
        """Tokens that a sequence with so many blocks in its tables could compute with the blocks that can be had."""
        return (blocks + self.free // len(self.layout.groups)) * self.layout.block_size - computed

    def take(self, end: int, blocks: int) -> None:
        """Lengthen tables with so many blocks to hold `end` tokens."""
        self.free -= max(0, -(-end // self.layout.block_size) - blocks) * len(self.layout.groups)

    def claim(self, blocks: Iterable[int]) -> None:
        """One more holder for each of these blocks of the tree."""
        for block in blocks:
            self.free -= self._references[block] + self._changes[block] == 0
            self._changes[block] += 1

    def give_back(self, sequence: Sequence) -> None:
        """A running sequence loses its blocks; those that others still hold are not free."""
        for block in (block for table in sequence.tables for block in table if block != ABSENT):
            self._changes[block] -= 1
            self.free += self._references[block] + self._changes[block] == 0
