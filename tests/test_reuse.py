"""How much a pile's prefixes share, against a plain trie and a plain cache; the known shares of a real trace."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import shared_data

from headrace.plan.reuse import count_distinct, count_least_recently_used
from headrace.schedule.prefixes import grow_tree, order_rows, pack

Rows = list[list[int]]
Prefix = tuple[int, ...]

ROOT = Path(__file__).resolve().parents[1]


def random_piles(count: int = 300) -> Iterator[Rows]:
    """Small piles of few symbols, so that prefixes are shared often; with empty, equal and contained rows."""
    source = random.Random(5)
    for _ in range(count):
        symbols = source.choice([[0, 1], [0, 1, 256, -1], list(range(-3, 2**31, 2**29))])
        rows: Rows = []
        for _ in range(source.randrange(14)):
            base = source.choice(rows)[: source.randrange(9)] if rows and source.random() < 0.7 else []
            rows.append(base + source.choices(symbols, k=source.randrange(5)))
        yield rows


def prefixes(row: list[int]) -> list[Prefix]:
    return [tuple(row[:end]) for end in range(1, len(row) + 1)]


def trie_nodes(rows: Rows) -> int:
    return len({prefix for row in rows for prefix in prefixes(row)})


def longest(rows: Rows) -> int:
    return max(map(len, rows), default=0)


def plain_cache(rows: Rows, capacity: int) -> int:
    """Symbol by symbol: a symbol that finds no room evicts the leaf used longest ago, never one of the running row."""
    used: dict[Prefix, int] = {}
    computed = 0
    for now, row in enumerate(rows):
        path = prefixes(row)
        hits = [prefix for prefix in path if prefix in used]
        used |= dict.fromkeys(hits, now)
        for prefix in path[len(hits) :]:
            computed += 1
            parents = {held[:-1] for held in used}
            leaves = [held for held, when in used.items() if when < now and held not in parents]
            if len(used) == capacity and leaves:
                del used[min(leaves, key=used.__getitem__)]
            if len(used) < capacity:
                used[prefix] = now
    return computed


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        ([], 0),
        ([[]], 0),
        ([[], [7], []], 1),
        ([[1, 2, 3], [1, 2, 3]], 3),
        ([[1, 2, 3], [1, 2], [1, 2, 4, 3], [2, 1]], 7),
        ([[1], [256], [65536]], 3),
    ],
)
def test_distinct_symbols_of_small_piles(rows: Rows, count: int) -> None:
    assert count_distinct(rows) == count
    assert count_distinct(iter(rows)) == count
    assert count_least_recently_used(iter(rows), 99) == count


def test_distinct_symbols_are_the_nodes_of_the_trie() -> None:
    for rows in random_piles():
        assert count_distinct(rows) == trie_nodes(rows)


def test_a_cache_without_limit_reaches_the_optimum_in_any_order() -> None:
    for rows in random_piles():
        assert count_least_recently_used(rows, sum(map(len, rows))) == trie_nodes(rows)


def test_sorted_rows_reach_the_optimum_with_room_for_the_longest() -> None:
    for rows in random_piles():
        assert count_least_recently_used(sorted(rows), longest(rows)) == trie_nodes(rows)


def test_a_small_cache_computes_what_a_plain_one_computes() -> None:
    for rows in random_piles():
        for capacity in range(longest(rows) + 6):
            computed = count_least_recently_used(rows, capacity)
            assert computed == plain_cache(rows, capacity)
            assert trie_nodes(rows) <= computed <= sum(map(len, rows))


def test_a_cache_that_holds_nothing_computes_everything() -> None:
    assert count_least_recently_used([[1, 2], [1, 2]], 0) == 4
    with pytest.raises(ValueError, match="-1"):
        count_least_recently_used([], -1)


def test_the_beginning_of_a_row_stays_longest() -> None:
    """Room for 4: the second row pushes out the end of the first, whose beginning the third finds."""
    assert count_least_recently_used([[1, 2, 3], [8, 9], [1, 2, 3]], 4) == 3 + 2 + 1
    assert count_least_recently_used([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]], 4) == 6 + 2


@pytest.fixture
def single_level(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("single_level")


@pytest.fixture(scope="module")
def trace() -> Rows:
    """The rows of the Mooncake conversation trace, as numbers of blocks of 512 tokens."""
    return [
        json.loads(line)["hash_ids"] for line in shared_data("mooncake_conversation.jsonl").read_text().splitlines()
    ]


def test_groups_of_one_level_keep_every_row(single_level: ModuleType) -> None:
    for rows in random_piles():
        plain, flat = single_level.group_by_root(rows), single_level.group_by_gain(rows)
        unspliced = single_level.group_by_gain(rows, splice=False)
        for groups in (plain, flat, unspliced):
            assert sorted(row for group in groups for row in group.rows) == list(range(len(rows)))
            for prefix, members in groups:
                assert len({tuple(rows[row][:prefix]) for row in members}) == 1
                assert all(len(rows[row]) >= prefix for row in members)
        if any(rows):
            best = 1 - trie_nodes(rows) / sum(map(len, rows))
            naive = single_level.share_saved(rows, plain)
            for groups in (flat, unspliced):
                assert naive <= single_level.share_saved(rows, groups) <= best + 1e-9


def test_a_group_is_cut_where_sharing_more_is_worth_computing_its_prefix_again(single_level: ModuleType) -> None:
    """Two families of three rows with one symbol in common: apart they share three symbols each, together one."""
    rows = [[0, family, family, row] for family in (1, 2) for row in (7, 8, 9)]
    assert single_level.group_by_root(rows) == [(1, [0, 1, 2, 3, 4, 5])]
    assert sorted(single_level.group_by_gain(rows)) == [(3, [0, 1, 2]), (3, [3, 4, 5])]


def test_the_shares_of_the_conversation_trace(trace: Rows) -> None:
    """The optimum and the shares that a cache in arrival order saves, as known from elsewhere."""
    total = sum(map(len, trace))
    assert total == 288_500
    best = count_distinct(trace)
    assert f"{1 - best / total:.2%}" == "36.64%"
    assert count_least_recently_used(sorted(trace), 500) == best
    arrival = {size: count_least_recently_used(trace, size) for size in (500, 2_000, 8_000, 32_000)}
    shares = {size: f"{1 - computed / total:.1%}" for size, computed in arrival.items()}
    assert shares == {500: "4.2%", 2_000: "5.4%", 8_000: "17.8%", 32_000: "33.2%"}


def test_the_plan_shares_more_of_the_conversation_trace_than_one_level(trace: Rows, single_level: ModuleType) -> None:
    """Naive and single level as known from elsewhere; ours through a cache of 500 blocks, in one window."""
    naive, flat = single_level.group_by_root(trace), single_level.group_by_gain(trace, splice=False)
    assert f"{single_level.share_saved(trace, naive):.2%}" == "4.17%"
    assert f"{single_level.share_saved(trace, flat):.2%}" == "33.62%" and len(flat) == 2_227
    order = order_rows(grow_tree([pack(row) for row in trace], [1.0] * len(trace)))
    computed = count_least_recently_used([trace[place] for place in order], 500)
    assert 1 - computed / sum(map(len, trace)) >= 0.36
