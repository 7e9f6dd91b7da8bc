"""What sharing of prefixes is worth: how many symbols of a pile must be computed, and how many a plain cache computes.

A row is its symbols: tokens, or blocks of tokens numbered so that equal blocks have equal numbers. All counts and
capacities are in these symbols, and only a whole prefix can be found again: a symbol is known after the symbols
before it. Symbols are whole numbers of 32 bits, and rows are packed: 100,000 rows of 1,000 tokens take 400 MB. Only
prompts count; what is generated takes no room here.

Automatic prefix caches are described by vLLM (its design page on automatic prefix caching) and by SGLang (arXiv
2312.07104, section 3, which also shows that depth-first order reaches the optimum if the cache holds the longest row).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from headrace.schedule.prefixes import count_common, pack


def count_distinct(rows: Iterable[Sequence[int]]) -> int:
    """Symbols to compute if nothing computed is ever forgotten: no order and no cache needs fewer.

    These are the nodes of the trie of all rows. Among sorted rows, a row adds to the trie what it does not share with
    the row before it.
    """
    count, previous = 0, pack(())
    for row in sorted(map(pack, rows)):
        count += len(row) - count_common(previous, row)
        previous = row
    return count


def count_least_recently_used(rows: Iterable[Sequence[int]], capacity: int) -> int:
    """Symbols computed if the rows run one after another, in this order, through a prefix cache of `capacity` symbols.

    A row takes its longest cached prefix and computes the rest. While it runs its symbols stay; afterwards all of them
    count as used now, and the cache keeps what was used last. Of symbols last used by the same row the later are
    evicted first, so nothing stays without its prefix: what vLLM does by freeing a row's blocks from the end, and
    SGLang by evicting leaves (SGLang drops whole leaves, this only as much as is needed). Of a row longer than the
    cache, the beginning is kept.
    """
    cache = PrefixCache(capacity)
    return sum(cache.run(pack(row)) for row in rows)


class Segment:
    """Packed symbols that follow their parent's in a cache; `children` are found by their first symbol."""

    __slots__ = ("children", "parent", "symbols")

    def __init__(self, parent: Segment | None, symbols: array[int]) -> None:
        self.parent = parent
        self.symbols = symbols
        self.children: dict[int, Segment] = {}
        if parent is not None:
            parent.children[symbols[0]] = self


class PrefixCache:
    """Which prefixes a cache holds, as a compressed tree; a run over it costs by segments, not by symbols.

    `recent` has every segment, the one to evict next first. A parent is used whenever a child is and comes after it,
    so the first is always a leaf.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"a cache cannot hold {capacity} symbols")
        self.free = capacity
        self.root = Segment(None, pack(()))
        self.recent: OrderedDict[Segment, None] = OrderedDict()

    def run(self, row: array[int]) -> int:
        """Put a packed row into the cache; how many of its symbols were not there."""
        path, found = self._find(row)
        if found < len(row):
            path.append(Segment(path[-1], row[found:]))
            self.free -= len(row) - found
        for segment in reversed(path[1:]):
            self.recent[segment] = None
            self.recent.move_to_end(segment)
        while self.free < 0:
            self._evict()
        return len(row) - found

    def _find(self, row: array[int]) -> tuple[list[Segment], int]:
        """The segments from the root on that make up the row's longest cached prefix, and its length."""
        path, found = [self.root], 0
        while found < len(row) and (child := path[-1].children.get(row[found])) is not None:
            length = len(child.symbols)
            shared = count_common(child.symbols, row[found : found + length])
            path.append(child if shared == length else self._split(child, shared))
            found += shared
        return path, found

    def _split(self, lower: Segment, length: int) -> Segment:
        """Cut the first symbols off a segment, which keeps its place in `recent`, into a parent of its own."""
        upper = Segment(lower.parent, lower.symbols[:length])
        lower.parent, lower.symbols = upper, lower.symbols[length:]
        upper.children[lower.symbols[0]] = lower
        return upper

    def _evict(self) -> None:
        """Drop the end of the leaf used longest ago, as much of it as must go."""
        leaf = next(iter(self.recent))
        length = max(len(leaf.symbols) + self.free, 0)
        self.free += len(leaf.symbols) - length
        if length == 0:
            del self.recent[leaf]
            assert leaf.parent is not None
            del leaf.parent.children[leaf.symbols[0]]
        leaf.symbols = leaf.symbols[:length]
