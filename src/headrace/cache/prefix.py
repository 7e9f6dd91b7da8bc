"""The prefix tree: which blocks hold the KV of which tokens after which other tokens, and who is about to compute more.

Knows tokens, their owners' names and block ids. Whether a block is held or free is the pool's matter; the ledger keeps
the two in step.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Rows
from typing import NamedTuple

from headrace.cache.layout import CacheLayout, SlidingGroup

ABSENT = -1

# The tokens of a block as bytes, and of a first block their owner's name: what two owners have never meets.
Label = tuple[str, bytes]


class Node:
    """One full block of tokens after its parent's; `blocks` has a block id for each cache group, or ABSENT.

    `pins` counts running sequences whose newest shared block this is: their place in the tree must stay.
    """

    __slots__ = ("blocks", "children", "label", "parent", "pins")

    def __init__(self, parent: Node | None, label: Label, groups: int) -> None:
        self.parent = parent
        self.label = label
        self.blocks = [ABSENT] * groups
        self.children: dict[Label, Node] = {}
        self.pins = 0


BlockKey = tuple[Node, Label]


class Hit(NamedTuple):
    """What the tree has of a sequence: `nodes` from the root on, and the key of the block to compute next.

    `key` is None where that block is not full of known tokens. The hit is `extensible` if it would be longer were that
    block in the tree, and `promised` if moreover a running sequence is about to compute it.

    A running sequence promises only the one block that it computes next: whoever shares later blocks with it shares
    this one too, finds just as much in the tree as it did, and so asks for this one first.
    """

    nodes: list[Node]
    key: BlockKey | None = None
    extensible: bool = False
    promised: bool = False


class Run:
    """What a query sees of a sliding group, found in one pass over the group's blocks: the first ones must all be
    there, and an unbroken run up to the query."""

    def __init__(self, group: SlidingGroup, depth: int = 0) -> None:
        """depth: so many blocks are known to suffice for a query behind them."""
        self.group = group
        self.depth = self._length = depth
        self._headed = True

    def extend(self, there: bool, position: int) -> bool:
        """One more block, there or not; whether a query at the position behind it has all that it sees."""
        self.depth += 1
        self._length = self._length + 1 if there else 0
        self._headed &= there or self.depth > self.group.first
        return self._headed and self._length >= self.depth - self.group.find_start(position)


class PrefixTree:
    """Nodes by content: a child is found by its label, compared in full, never by a hash alone.

    Each owner's nodes are a tree of their own below the root, which is nobody's; it is there while it has nodes.

    In a layout with a full-attention group, every node has its blocks of all full-attention groups: they are evicted
    together, and with them the node. A sliding-window group may lose its block of any node.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self.layout = layout
        self.root = Node(None, ("", b""), len(layout.groups))
        self.places: dict[int, tuple[Node, int]] = {}
        self.promises: dict[BlockKey, int] = {}
        self._sliding = layout.sliding

    def match(self, tokens: Rows[int], limit: int, owner: str = "") -> Hit:
        """The longest usable prefix of an owner's `tokens` in at most `limit` whole blocks. Changes nothing.

        Usable is a prefix whose every node has the blocks of all full-attention groups, and whose nodes have those
        blocks of sliding-window groups that the next query can still see.
        """
        node, nodes = self.root, []
        for depth in range(limit):
            child = node.children.get(self.label(tokens, depth, owner))
            if child is None:
                break
            nodes.append(child)
            node = child
        if self._sliding:
            del nodes[self._usable(nodes) :]
        key = self.next_key(nodes[-1] if nodes else self.root, tokens, len(nodes), owner)
        extensible = len(nodes) < limit
        return Hit(nodes, key, extensible, extensible and key in self.promises)

    def label(self, tokens: Rows[int], depth: int, owner: str) -> Label:
        """The label of the depth-th block of an owner's tokens, counted from 0."""
        size = self.layout.block_size
        return "" if depth else owner, array("i", tokens[depth * size : (depth + 1) * size]).tobytes()

    def next_key(self, node: Node, tokens: Rows[int], depth: int, owner: str = "") -> BlockKey | None:
        """The key of the block after `node`, the depth-th of the tokens; None if not all its tokens are known."""
        known = (depth + 1) * self.layout.block_size <= len(tokens)
        return (node, self.label(tokens, depth, owner)) if known else None

    def _usable(self, nodes: list[Node]) -> int:
        """How many of these nodes a sequence may start behind."""
        best, size = 0, self.layout.block_size
        runs = [Run(each) for each in self._sliding]
        for depth, node in enumerate(nodes, 1):
            there = [run.extend(node.blocks[run.group.group] != ABSENT, depth * size) for run in runs]
            best = depth if all(there) else best
        return best

    def child(self, node: Node, label: Label) -> Node:
        """The node with this label after `node`, made if there is none."""
        found = node.children.get(label)
        if found is None:
            found = node.children[label] = Node(node, label, len(self.layout.groups))
        return found

    def put(self, node: Node, group: int, block: int) -> None:
        """This block holds the node's KV for this group."""
        node.blocks[group] = block
        self.places[block] = (node, group)

    def forget(self, block: int) -> list[int]:
        """Drop an evictable block; all blocks that lost their place with it, by group.

        The last release of a node's full-attention blocks is never before its children's (who holds or keeps a child
        does so with its parents, and lets go of them last), so the oldest evictable one belongs to a leaf.
        """
        node, group = self.places[block]
        if self.layout.groups[group].window is None:
            dropped = [each for each in node.blocks if each != ABSENT]
        else:
            dropped = [block]
        for each in dropped:
            del self.places[each]
        node.blocks = [ABSENT if each in dropped else each for each in node.blocks]
        self._prune(node)
        return dropped

    def pin(self, node: Node) -> None:
        node.pins += 1

    def unpin(self, node: Node) -> None:
        node.pins -= 1
        self._prune(node)

    def promise(self, key: BlockKey) -> None:
        """One more running sequence is about to compute this block."""
        self.promises[key] = self.promises.get(key, 0) + 1

    def fulfil(self, key: BlockKey) -> None:
        """One such sequence has computed it, or will not."""
        if self.promises[key] == 1:
            del self.promises[key]
        else:
            self.promises[key] -= 1

    def _prune(self, node: Node) -> None:
        """Remove nodes that hold nothing, lead nowhere and are nobody's place, from here towards the root."""
        while node.parent and not node.children and not node.pins and all(block == ABSENT for block in node.blocks):
            parent = node.parent
            del parent.children[node.label]
            node = parent

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken. O(nodes)."""
        full = [index for index, group in enumerate(self.layout.groups) if group.window is None]
        found: dict[int, tuple[Node, int]] = {}
        stack = [self.root]
        while stack:
            node = stack.pop()
            length = array("i").itemsize * self.layout.block_size
            for label, child in node.children.items():
                if child.parent is not node or child.label != label or len(label[1]) != length:
                    raise AssertionError(f"a node is in the wrong place: {label}")
                if any(child.blocks[group] == ABSENT for group in full):
                    raise AssertionError(f"a node lost a block of a full-attention group: {child.blocks}")
                if not child.children and not child.pins and all(block == ABSENT for block in child.blocks):
                    raise AssertionError(f"an empty node was not removed: {label}")
                found.update({block: (child, group) for group, block in enumerate(child.blocks) if block != ABSENT})
                stack.append(child)
        if found != self.places:
            raise AssertionError("the tree's blocks and their places differ")
