"""The prefix tree by itself: matches by content, windows, promises, removal of what nothing leads to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.cache.layout import CacheLayout
from headrace.cache.prefix import ABSENT, Node, PrefixTree
from headrace.schedule.prefixes import pack


def make_tree(windows: list[int | None], first: int = 0) -> PrefixTree:
    layout = CacheLayout.from_windows(windows, 4)
    groups = tuple(replace(each, first=first if each.window else 0) for each in layout.groups)
    return PrefixTree(replace(layout, groups=groups))


def fill(tree: PrefixTree, tokens: list[int], first_block: int = 0, owner: str = "") -> list[Node]:
    """Put the whole blocks of tokens into the tree; ids count up by depth, then group."""
    nodes, node, block = [], tree.root, first_block
    for depth in range(len(tokens) // 4):
        node = tree.child(node, tree.label(tokens, depth, owner))
        for group in range(len(tree.layout.groups)):
            tree.put(node, group, block)
            block += 1
        nodes.append(node)
    return nodes


def test_match_is_by_content_in_whole_blocks() -> None:
    tree = make_tree([None])
    nodes = fill(tree, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert tree.match([1, 2, 3, 4, 5, 6, 7, 8, 9], 2).nodes == nodes
    assert tree.match([1, 2, 3, 4, 5, 6, 7, 8, 9], 1).nodes == nodes[:1]
    assert tree.match([1, 2, 3, 4, 5, 6, 7, 9, 9], 2).nodes == nodes[:1]
    assert tree.match([5, 6, 7, 8, 9], 1).nodes == []
    assert tree.match([1, 2, 3], 0).nodes == []


def test_equal_tokens_of_two_owners_do_not_meet() -> None:
    tree, tokens = make_tree([None]), [1, 2, 3, 4, 5, 6, 7, 8, 9]
    first = fill(tree, tokens, owner="a")
    second = fill(tree, tokens[:5], 2, owner="b")
    tree.check()
    assert tree.match(tokens, 2, "a").nodes == first and tree.match(tokens, 2, "b").nodes == second
    assert tree.match(tokens, 2).nodes == []
    tree.promise(tree.next_key(tree.root, tokens, 0, "c") or (tree.root, ()))
    assert tree.match(tokens, 2, "c").promised and not tree.match(tokens, 2).promised
    for block in (1, 0):
        tree.forget(block)
    assert [node.label[0] for node in tree.root.children.values()] == ["b"]
    tree.forget(2)
    assert not tree.root.children


def test_tokens_of_equal_hash_are_not_equal() -> None:
    """hash(-1) == hash(-2) in Python, so these blocks collide."""
    tree = make_tree([None])
    fill(tree, [-1, -1, -1, -1])
    assert hash((-1, -1, -1, -1)) == hash((-2, -2, -2, -2))
    assert tree.match([-2, -2, -2, -2, 0], 1).nodes == []
    assert len(tree.match([-1, -1, -1, -1, 0], 1).nodes) == 1


@pytest.mark.parametrize(
    ("lost", "usable"), [(set(), 6), ({5}, 5), ({4}, 4), ({3}, 6), ({0, 1, 2}, 6), ({3, 5}, 3), ({2, 4}, 2)]
)
def test_a_window_needs_only_the_blocks_that_the_next_query_sees(lost: set[int], usable: int) -> None:
    """Window 6, blocks of 4: at position 24 the query sees 19 to 24, that is blocks 4 and 5."""
    tree = make_tree([None, 6])
    tokens = list(range(25))
    nodes = fill(tree, tokens)
    for depth in lost:
        assert tree.forget(nodes[depth].blocks[1]) == [depth * 2 + 1]
    tree.check()
    assert len(tree.match(tokens, 6).nodes) == usable


@pytest.mark.parametrize(
    ("lost", "usable"), [(set(), 6), ({2}, 6), ({2, 3}, 6), ({5}, 5), ({1}, 1), ({0}, 0), ({1, 4}, 1), ({3, 5}, 3)]
)
def test_first_tokens_are_needed_beside_what_a_window_sees(lost: set[int], usable: int) -> None:
    """The same with 8 first tokens: blocks 0 and 1 are seen from everywhere."""
    tree = make_tree([None, 6], first=8)
    nodes = fill(tree, list(range(25)))
    for depth in lost:
        tree.forget(nodes[depth].blocks[1])
    assert len(tree.match(list(range(25)), 6).nodes) == usable


def test_a_full_attention_block_takes_its_node_with_it() -> None:
    tree = make_tree([None, None, 6])
    nodes = fill(tree, list(range(8)))
    assert tree.forget(nodes[1].blocks[0]) == [3, 4, 5]
    assert tree.match(list(range(9)), 2).nodes == nodes[:1]
    tree.check()
    assert set(tree.places) == {0, 1, 2}


def test_pinned_and_leading_nodes_stay_without_blocks() -> None:
    tree = make_tree([6])
    nodes = fill(tree, list(range(12)))
    tree.pin(nodes[2])
    for node in nodes:
        tree.forget(node.blocks[0])
        assert node.blocks == [ABSENT]
    tree.check()
    assert tree.root.children and nodes[1].children
    tree.unpin(nodes[2])
    assert not tree.root.children and not tree.places


def test_promises_are_told_and_counted() -> None:
    tree = make_tree([None])
    tokens = list(range(12))
    node = fill(tree, tokens[:4])[0]
    key = tree.next_key(node, tokens, 1)
    assert key == (node, ("", pack(tokens[4:8]).tobytes()))
    assert tree.next_key(node, tokens[:7], 1) is None
    tree.promise(key)
    tree.promise(key)
    assert tree.match(tokens, 2).promised and tree.match(tokens, 2).key == key
    assert not tree.match(tokens, 1).promised and not tree.match(tokens, 1).extensible
    assert not tree.match([*range(4), 9, 9, 9, 9, 9], 2).promised
    tree.fulfil(key)
    assert tree.match(tokens, 2).promised
    tree.fulfil(key)
    assert not tree.match(tokens, 2).promised and not tree.promises


def test_check_finds_damage() -> None:
    tree = make_tree([None, 6])
    nodes = fill(tree, list(range(8)))
    tree.check()
    nodes[0].blocks[0] = ABSENT
    with pytest.raises(AssertionError, match="full-attention"):
        tree.check()
    nodes[0].blocks[0] = 17
    with pytest.raises(AssertionError, match="places differ"):
        tree.check()
