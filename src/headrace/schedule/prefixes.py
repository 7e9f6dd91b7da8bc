"""The prefixes that rows share, as a tree, and an order of the rows that computes each of them once.

After BatchLLM (arXiv 2412.03594, section 3), with as many levels of sharing as the rows have instead of one: rows are
visited depth-first, so that a shared prefix is computed at its first row and last needed at its last, and of two
branches the one with more decoding for its prefill goes first, so that later prefills have decodes to ride with.
That depth-first order reaches the best hit rate of any is SGLang's theorem (arXiv 2312.07104, section 3).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence


class Branch:
    """Rows that begin with the same `depth` tokens, or one row (`row` is its place in the pile, else -1).

    `prefill` counts the tokens below the branch's own, each shared one once; `decode` the tokens expected to be
    generated; `first` is the earliest row, `longest` the most that one of the rows is expected to generate.
    """

    __slots__ = ("branches", "decode", "depth", "first", "longest", "prefill", "row", "rows")

    def __init__(self, depth: int, row: int = -1, decode: float = 0.0) -> None:
        self.depth = depth
        self.row = row
        self.first = row
        self.rows = int(row >= 0)
        self.decode = self.longest = decode
        self.prefill = 0
        self.branches: list[Branch] = []

    def add(self, branch: Branch) -> None:
        self.first = branch.first if self.first < 0 else min(self.first, branch.first)
        self.rows += branch.rows
        self.decode += branch.decode
        self.longest = max(self.longest, branch.longest)
        self.prefill += branch.depth - self.depth + branch.prefill
        self.branches.append(branch)

    def ratio(self, above: int) -> float:
        """Expected decoding for each token of prefill that is left below a parent of depth `above`."""
        return self.decode / max(1, self.depth - above + self.prefill)


def pack(tokens: Iterable[int]) -> array[int]:
    """Tokens, 4 bytes each; themselves if they are packed. Raises OverflowError for one that takes more."""
    return tokens if isinstance(tokens, array) and tokens.typecode == "i" else array("i", tokens)


def count_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the start of both rows."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def grow_tree(
    rows: Sequence[array[int]], decode: Sequence[float], unit: int = 1, owners: Sequence[str] | None = None
) -> Branch:
    """The tree of packed rows; `decode` is what each is expected to generate. Prefixes are shared in whole `unit`s.

    Rows of different `owners`, where those are given, share nothing. Each owner's are sorted by their tokens, so those
    that share a prefix are neighbours, and the tree follows from what each has in common with the next: O(n log n)
    comparisons of packed rows as they lie, no node and no object a token.
    """
    places = sorted(range(len(rows)), key=rows.__getitem__)
    if owners is not None:
        places.sort(key=owners.__getitem__)
    root = Branch(0)
    path = [root]
    common = 0
    for index, place in enumerate(places):
        while path[-1].depth > common:
            closed = path.pop()
            if path[-1].depth < common:
                path.append(Branch(common))
            path[-1].add(closed)
        row = rows[place]
        after = places[index + 1] if index + 1 < len(places) else None
        if after is None or (owners is not None and owners[after] != owners[place]):
            common = 0
        else:
            common = count_common(row, rows[after]) // unit * unit
        if common > path[-1].depth:
            path.append(Branch(common))
        path[-1].add(Branch(len(row), place, decode[place]))
    while len(path) > 1:
        closed = path.pop()
        path[-1].add(closed)
    return root


def order_rows(root: Branch, tail: int = 0) -> list[int]:
    """Places of the rows, depth-first, branches with more decoding for their prefill first, else the earlier one.

    Branches that lie wholly within the last `tail` rows go by their longest output instead: a long row that started
    last would run alone.
    """
    order: list[int] = []
    stack = [(root, 0)]
    while stack:
        branch, after = stack.pop()
        if branch.row >= 0:
            order.append(branch.row)
        stack.extend(rank(branch, after, tail))
    return order


def rank(branch: Branch, after: int, tail: int) -> list[tuple[Branch, int]]:
    """The branches of one that `after` rows follow, each with how many rows follow it; the last one first."""
    ranked = sorted(branch.branches, key=lambda each: (-each.ratio(branch.depth), each.first))
    start, rows = len(ranked), after
    while start and rows + ranked[start - 1].rows <= tail:
        start -= 1
        rows += ranked[start].rows
    ranked[start:] = sorted(ranked[start:], key=lambda each: (-each.longest, each.first))
    found = []
    for each in reversed(ranked):
        found.append((each, after))
        after += each.rows
    return found
