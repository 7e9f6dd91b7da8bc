"""Sharing of prefixes in one level, as BatchLLM does it: what Headrace's order of rows is compared with.

Rows are put into groups, each with one prefix that all its rows begin with and that is computed once; what follows it
is computed for every row. BatchLLM, arXiv 2412.03594, chooses the groups by flattening the tree of common prefixes
from the bottom up ("global prefix identification").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Rows = Sequence[list[int]]


class Group(NamedTuple):
    """Rows by number, and how many first symbols of each are the group's prefix."""

    prefix: int
    rows: list[int]


@dataclass(eq=False)
class Node:
    """Symbols `start` to `end` of every row below; `ends` are the rows that end here, `leaves` counts all below."""

    start: int
    end: int
    children: list[Node] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    leaves: int = 0

    def __len__(self) -> int:
        return self.end - self.start


def group_by_root(rows: Rows) -> list[Group]:
    """One group for each child of the root: rows with the same first symbol, and all that they have in common."""
    return list_groups(build_tree(rows))


def group_by_gain(rows: Rows, splice: bool = True) -> list[Group]:
    """BatchLLM's groups. Without `splice`, a node that loses all children but one stays cut off from that one."""
    root = build_tree(rows)
    edges = [(parent, child) for parent in walk(root) for child in parent.children]
    # A child comes after its parent in `edges`: backwards, all below a child is flat before the child's turn.
    for parent, child in reversed(edges):
        lift(parent, child, splice)
    return list_groups(root)


def share_saved(rows: Rows, groups: list[Group]) -> float:
    """1 - physical / logical: which part of all symbols need not be computed."""
    total = sum(map(len, rows))
    return sum(group.prefix * (len(group.rows) - 1) for group in groups) / total


def build_tree(rows: Rows) -> Node:
    """The compressed tree of common prefixes. Sorted rows leave it in depth-first order: only the last path changes."""
    root = Node(0, 0)
    path: list[Node] = [root]
    previous: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: rows[number]):
        row = rows[number]
        shared = count_common(previous, row)
        while path[-1] is not root and path[-1].start >= shared:
            path.pop()
        lower = path[-1]
        if lower.end > shared:
            path[-1] = path[-2].children[-1] = Node(lower.start, shared, [lower])
            lower.start = shared
        if len(row) > shared:
            path.append(Node(shared, len(row)))
            path[-2].children.append(path[-1])
        path[-1].ends.append(number)
        previous = row
    for node in reversed(walk(root)):
        node.leaves = len(node.ends) + sum(child.leaves for child in node.children)
    return root


def count_common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def walk(root: Node) -> list[Node]:
    """All nodes, parents before their children; without recursion, as piles can be as deep as rows are long."""
    found, waiting = [], [root]
    while waiting:
        found.append(waiting.pop())
        waiting += reversed(found[-1].children)
    return found


def lift(parent: Node, child: Node, splice: bool) -> None:
    """Make those grandchildren children that gain by it: their groups share more, and compute the child's part again.

    With `splice`, a child that keeps one child and no row of its own becomes one with it; so if all gain, one stays.
    """
    lifted = [node for node in child.children if (node.leaves - 1) * len(node) > len(child)]
    if splice and len(lifted) == len(child.children) and not child.ends:
        lifted = lifted[:-1]
    for node in lifted:
        node.start = child.start
        child.leaves -= node.leaves
    gone = set(map(id, lifted))
    child.children = [node for node in child.children if id(node) not in gone]
    parent.children += lifted
    if splice and len(child.children) == 1 and not child.ends:
        (last,) = child.children
        child.end, child.children, child.ends = last.end, last.children, last.ends


def list_groups(root: Node) -> list[Group]:
    """The root's children with all rows below them, if any are left; empty rows are a group of their own."""
    children = [child for child in root.children if child.leaves]
    below = [Group(child.end, [row for node in walk(child) for row in node.ends]) for child in children]
    return [Group(0, root.ends), *below] if root.ends else below
