"""The tree of shared prefixes and the order it gives, against a trie of single tokens; the four schedules' orders."""

from __future__ import annotations

import random

import pytest
from schedule_driver import Driver, make_state

from headrace.core import Constraint, Sequence
from headrace.plan.reuse import count_distinct, count_least_recently_used
from headrace.schedule.base import Schedule
from headrace.schedule.choice import SCHEDULES
from headrace.schedule.planned import Planned
from headrace.schedule.prefixes import Branch, count_common, grow_tree, order_rows, pack
from headrace.schedule.shortest import AGEING, ShortestFirst


def make_rows(draw: random.Random, count: int = 40) -> list[list[int]]:
    """Rows that share prefixes at several levels; some equal, some the beginning of another, some empty."""
    rows: list[list[int]] = [[]]
    while len(rows) < count:
        parent = draw.choice(rows)
        rows.append(
            parent[: draw.randrange(len(parent) + 1)] + [draw.randrange(-3, 900) for _ in range(draw.randrange(6))]
        )
    draw.shuffle(rows)
    return rows


def list_branches(root: Branch) -> list[tuple[Branch, Branch]]:
    """Every branch with its parent."""
    found, stack = [], [root]
    while stack:
        parent = stack.pop()
        for branch in parent.branches:
            found.append((parent, branch))
            stack.append(branch)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_the_tree_is_that_of_the_rows(seed: int) -> None:
    draw = random.Random(seed)
    rows = make_rows(draw)
    decode = [draw.randrange(1, 50) for _ in rows]
    root = grow_tree([pack(row) for row in rows], decode)
    assert root.prefill == count_distinct(rows) and root.decode == sum(decode) and root.rows == len(rows)
    for parent, branch in list_branches(root):
        assert branch.depth >= parent.depth
        if branch.row < 0:
            assert len(branch.branches) > 1, "a branch of one row shares nothing"
    order = order_rows(root)
    assert sorted(order) == list(range(len(rows)))
    longest = max(map(len, rows))
    assert count_least_recently_used([rows[place] for place in order], longest) == count_distinct(rows)


@pytest.mark.parametrize("unit", [1, 4])
def test_common_prefixes(unit: int) -> None:
    draw = random.Random(unit)
    for _ in range(300):
        one = [draw.randrange(3) for _ in range(draw.randrange(20))]
        other = one[: draw.randrange(20)] + [draw.randrange(3) for _ in range(draw.randrange(20))]
        equal = 0
        while equal < min(len(one), len(other)) and one[equal] == other[equal]:
            equal += 1
        assert count_common(pack(one), pack(other)) == equal


def test_prefixes_are_shared_in_whole_blocks() -> None:
    rows = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 9, 9]]
    root = grow_tree([pack(row) for row in rows], [1, 1, 1], unit=2)
    assert [branch.depth for branch in root.branches] == [2]
    assert root.prefill == 2 + (2 + 1 + 1) + 3


def test_more_decoding_for_its_prefill_goes_first_and_long_rows_do_not_come_last() -> None:
    rows = [[1] * 40 + [2], [1] * 40 + [3], [5] * 4, [6] * 100, [7] * 100]
    decode = [10, 10, 10, 1, 90]
    root = grow_tree([pack(row) for row in rows], decode)
    assert order_rows(root) == [2, 4, 0, 1, 3]
    assert order_rows(root, tail=3) == [2, 4, 0, 1, 3]
    slow = grow_tree([pack(row) for row in ([6] * 100, [7] * 1000, [8] * 10)], [1, 2, 1])
    assert order_rows(slow) == [2, 0, 1] and order_rows(slow, tail=2) == [2, 1, 0]


@pytest.mark.parametrize("above", [[], [[1] * 8], [[1] * 8, [2] * 8]])
def test_a_long_row_is_not_last_whatever_all_rows_share(above: list[list[int]]) -> None:
    """Under no instruction, under one that all rows share, and under two of which the second has the long row."""
    rows = [[*prefix, 10 + place] for prefix in above or [[]] for place in range(40)]
    rows.append([*(above[-1] if above else []), *[9] * 200])
    decode = [8.0] * (len(rows) - 1) + [40.0]
    if len(above) == 2:
        decode[:40] = [9.0] * 40
    tree = grow_tree([pack(row) for row in rows], decode)
    long = len(rows) - 1
    assert order_rows(tree)[-1] == long, "it has the least decoding for its prefill"
    order = order_rows(tree, tail=6)
    assert order.index(long) == len(rows) - 6
    assert [each for each in order if each != long] == [each for each in order_rows(tree) if each != long]


def add_rows(driver: Driver, rows: list[list[int]], length: int = 3, n: int = 1) -> list[Sequence]:
    return [each for row in rows for each in driver.add(row, length, n)]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_keeps_all_answers_alike_and_leaves_choices_together(name: str) -> None:
    draw, schedule = random.Random(3), SCHEDULES[name]()
    driver = Driver(make_state([None], 500, 4))
    waiting = add_rows(driver, [row or [1] for row in make_rows(draw)], n=3)
    draw.shuffle(waiting)
    waiting.sort(key=lambda each: each.request.id)
    order = schedule.arrange(waiting, driver.state)
    assert sorted(each.number for each in order) == list(range(len(waiting)))
    assert [each.number for each in order] == [each.number for each in schedule.arrange(waiting, driver.state)]
    if name != "planned":  # there, equal prompts of different requests may be mixed
        requests = [each.request.id for each in order[::3]]
        assert [each.request.id for each in order] == [name for name in requests for _ in range(3)]


def count_computed(schedule: Schedule, rows: list[list[int]], num_blocks: int) -> int:
    """Prompt and output tokens that a small pool computes of rows with one output token each."""
    driver = Driver(make_state([None], num_blocks, 4, step_tokens=64, max_sequences=4), schedule=schedule)
    add_rows(driver, rows, 1)
    driver.run()
    return driver.computed_tokens


def test_a_plan_computes_each_shared_block_once_in_little_memory() -> None:
    draw = random.Random(0)
    roots = [[group] * 24 for group in range(12)]
    rows = [root + [100 + draw.randrange(900) for _ in range(4)] for root in roots for _ in range(10)]
    draw.shuffle(rows)
    # Little more than four rows take together: what is computed again was evicted while it was still wanted.
    computed = {name: count_computed(SCHEDULES[name](), rows, 40) for name in SCHEDULES}
    assert computed["planned"] == 12 * 24 + 120 * 4
    assert min(computed[name] for name in SCHEDULES if name != "planned") > 1.5 * computed["planned"]


def test_the_last_rows_go_by_the_lengths_that_have_been_seen() -> None:
    """All that is known at first is `max_tokens`, alike for both kinds; the last eight to be admitted know better."""
    driver = Driver(make_state([None], 500, 4, max_sequences=8), schedule=Planned())
    kinds = [(Constraint("regex", "short"), 2), (Constraint("regex", "long"), 30)]
    for row in range(120):
        constraint, length = kinds[row % 2]
        driver.add([row] * 5, length, max_tokens=64, constraint=constraint)
    admitted: list[int] = []
    while driver.state.waiting:
        plan = driver.plan()
        admitted += [each.sequence for each in plan.admit]
        driver.execute(plan)
    assert admitted[:64] == list(range(64))
    assert [driver.lengths[number] for number in admitted[-8:]] == [30] * 4 + [2] * 4


def test_nothing_is_overtaken_for_ever() -> None:
    driver = Driver(make_state([None], 500, 4))
    (long,) = driver.add([1] * 400, 10)
    add_rows(driver, [[2]] * 100, 10)
    order = ShortestFirst().arrange(list(driver.state.waiting), driver.state)
    overtaken = order.index(long)
    assert 0 < overtaken <= 399 / AGEING
    assert order[0].prompt_length == 1


def test_what_is_left_of_a_window_goes_before_the_next() -> None:
    driver = Driver(make_state([None], 500, 4, max_sequences=2), schedule=Planned())
    first = add_rows(driver, [[1] * 50, [2] * 50, [3] * 50, [4] * 50], 1)
    driver.plan()
    driver.execute(driver.plan())
    better = add_rows(driver, [[5]], 30)
    driver.plan()
    waiting = list(driver.state.waiting)
    assert len(waiting) > 1 and waiting[-1] in better and set(waiting[:-1]) <= set(first)


def test_a_plan_sees_preempted_rows_first() -> None:
    driver = Driver(make_state([None], 500, 4, max_sequences=2), schedule=Planned())
    first = add_rows(driver, [[1] * 9, [2] * 9, [3] * 9])
    driver.execute(driver.plan())
    waiting = driver.state.waiting[0]
    assert waiting in first
    waiting.preemptions = 1
    add_rows(driver, [[4]], 30)
    driver.plan()
    assert driver.state.waiting[0] is waiting
