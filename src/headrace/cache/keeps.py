"""Conversations whose KV outlives their last turn, so that the next one finds it.

After Continuum (arXiv 2511.02230), with one time to live for all. Knows blocks, not tokens; reads no clock: when a keep
ends is a number of the caller's.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from headrace.cache.blocks import BlockPool
from headrace.core import Request

# The share of the pool that may be kept.
KEEP_SHARE = 0.5

# An owner's name and that of the program.
Program = tuple[str, str]


def program_of(request: Request) -> Program:
    return request.owner, request.program


class Keep(NamedTuple):
    """Blocks that stay until a time. They are let go in their order: a child in the tree before its parent."""

    until: float
    blocks: tuple[int, ...]


class Keeps:
    """At most one keep for each program, over a pool. Together they have at most KEEP_SHARE of its blocks.

    A keep never stands in a sequence's way: kept blocks count as available, and when no other can be had, keeps end.
    The one that would have lasted longest goes first, there and where the share is passed. With one time to live that
    is the youngest: its next turn is probably the furthest away, and what has been kept so far was not kept in vain.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.most_blocks = int(KEEP_SHARE * pool.num_blocks)
        self._keeps: dict[Program, Keep] = {}

    def __len__(self) -> int:
        return len(self._keeps)

    def __contains__(self, program: Program) -> bool:
        return program in self._keeps

    def add(self, program: Program, keep: Keep) -> None:
        """Keep these held blocks instead of what was kept for the program."""
        self.drop(program)
        self._keeps[program] = keep
        for block in keep.blocks:
            self.pool.keep(block)
        while len(self.pool.keeps) > self.most_blocks:
            self.drop(self._last())

    def drop(self, program: Program) -> None:
        """Let go of what is kept for the program, if anything is."""
        keep = self._keeps.pop(program, None)
        for block in keep.blocks if keep is not None else ():
            self.pool.let_go(block)

    def expire(self, now: float) -> int:
        """Let go of what was to be kept until now or before; for how many programs."""
        expired = [program for program, keep in self._keeps.items() if keep.until <= now]
        for program in expired:
            self.drop(program)
        return len(expired)

    def give_way(self) -> None:
        """End keeps until a block is evictable or nothing is kept."""
        while self._keeps and not self.pool.evictable:
            self.drop(self._last())

    def _last(self) -> Program:
        """The program whose keep ends last; of several, the one that was kept last."""
        return max(reversed(self._keeps), key=lambda program: self._keeps[program].until)

    def check(self) -> None:
        """Raise AssertionError unless the pool keeps just these blocks."""
        if Counter(block for keep in self._keeps.values() for block in keep.blocks) != self.pool.keeps:
            raise AssertionError("the pool's kept blocks are not those of the keeps")
