"""The pool of KV blocks: which are free, how many sequences hold each, which stay though nobody holds them.

Knows block ids and reference counts only; not tokens, not sequences, not tensors.
"""

from __future__ import annotations

from collections import OrderedDict


class BlockPool:
    """`num_blocks` equal blocks with ids from 0. Every operation takes O(1).

    Ids are exact. Free blocks are a stack: unused blocks come in ascending order, and the block that was freed last is
    used first, so memory that was never needed is never touched. A *cached* block (its content may be found again)
    that nobody holds is not free but evictable; evictable blocks are ordered by the time of their last release.
    A cached block may be *kept*, any number of times: it counts as available, but is not evictable until it is let go.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached = [False] * num_blocks
        self._evictable: OrderedDict[int, None] = OrderedDict()
        # How often each kept block is kept; how many of them nobody holds.
        self.keeps: dict[int, int] = {}
        self._idle = 0

    @property
    def available(self) -> int:
        """Blocks that nobody holds: free, evictable, or kept."""
        return len(self._free) + len(self._evictable) + self._idle

    @property
    def evictable(self) -> int:
        """Cached blocks that nobody holds and nothing keeps."""
        return len(self._evictable)

    def allocate(self) -> int | None:
        """A free block, now held once; None if there is none (evict first)."""
        if not self._free:
            return None
        block = self._free.pop()
        self.references[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """One more holder of a block that is held or cached."""
        if self.references[block] == 0:
            if block in self.keeps:
                self._idle -= 1
            else:
                del self._evictable[block]
        self.references[block] += 1

    def release(self, block: int) -> None:
        """One holder fewer; the last one leaves a kept block as it is, a cached one evictable and any other free."""
        self.references[block] -= 1
        if self.references[block] == 0:
            if block in self.keeps:
                self._idle += 1
            elif self._cached[block]:
                self._evictable[block] = None
            else:
                self._free.append(block)

    def cache(self, block: int) -> None:
        """Leave this held block's content in place when its last holder has gone."""
        self._cached[block] = True

    def keep(self, block: int) -> None:
        """Once more: this held and cached block is not evictable when its last holder has gone."""
        self.keeps[block] = self.keeps.get(block, 0) + 1

    def let_go(self, block: int) -> None:
        """Once less; the last time leaves a block that nobody holds evictable."""
        self.keeps[block] -= 1
        if self.keeps[block] == 0:
            del self.keeps[block]
            if self.references[block] == 0:
                self._idle -= 1
                self._evictable[block] = None

    def uncache(self, block: int) -> None:
        """Forget the content of an evictable block: it becomes free."""
        del self._evictable[block]
        self._cached[block] = False
        self._free.append(block)

    def oldest_evictable(self) -> int:
        """The evictable block whose last release is longest ago. Raises MemoryError if there is none."""
        if not self._evictable:
            raise MemoryError(
                f"all {self.num_blocks} KV blocks are held: a step was planned that does not fit the pool"
            )
        return next(iter(self._evictable))

    def cached_blocks(self) -> set[int]:
        """Ids of all cached blocks, held or not. O(n), for checks."""
        return {block for block, cached in enumerate(self._cached) if cached}

    def check(self) -> None:
        """Raise AssertionError, naming the block, if an invariant is broken. O(n)."""
        free = set(self._free)
        _require(len(free) == len(self._free), "a block is in the free list twice")
        for block, references in enumerate(self.references):
            _require(references >= 0, f"block {block} has {references} references")
            cached, evictable = self._cached[block], block in self._evictable
            _require(
                (block in free) == (references == 0 and not cached),
                f"block {block}: wrongly in or out of the free list",
            )
            kept = block in self.keeps
            _require(cached or not kept, f"block {block} is kept and has no content")
            _require(evictable == (references == 0 and cached and not kept), f"block {block}: wrongly evictable or not")
        idle = sum(self.references[block] == 0 for block in self.keeps)
        _require(idle == self._idle, f"{idle} kept blocks are held by nobody, not {self._idle}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
