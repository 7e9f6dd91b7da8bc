"""The real scheduler and ledger against the slow ones: equal plans and exactly equal block ids, step by step."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from schedule_driver import Driver, make_state, snapshot
from schedule_oracle import TILE, Oracle
from step_times import SLOW_PAIRS

from headrace.cache.checks import check_ledger
from headrace.core import Sequence, StepPlan
from headrace.schedule import budget
from headrace.schedule.budget import Deadline

LAYOUTS: list[list[int | None]] = [
    [None],
    [None, None],
    [6, None],
    [6, 6, None],
    [9, 9, None, None, None, None],
    [5],
    [3, 14],
]


def make_scene(seed: int, served: bool) -> tuple[random.Random, Driver, Oracle]:
    draw = random.Random(seed)
    size = draw.choice([2, 4, 4])
    num_blocks = draw.randrange(20, 60) if served else draw.randrange(30, 90)
    short_prefill = (None, 4, 12)[seed % 3] if served else None
    options = {
        "step_tokens": draw.choice([3, 8, 17, 40]),
        "max_sequences": draw.choice([2, 5, 16]),
        "prefix_cache": draw.random() < 0.85,
    }
    state = make_state(LAYOUTS[seed % len(LAYOUTS)], num_blocks, size, **options)
    groups = [group.window for group in state.ledger.layout.groups]
    within = Deadline(draw.choice([6.0, 25.0, 60.0]), SLOW_PAIRS) if seed % 5 == 4 else None
    state.limits = replace(state.limits, short_prefill=short_prefill, deadline=within)
    driver = Driver(state, vocabulary=draw.choice([2, 1000]))
    oracle = Oracle(groups, size, num_blocks, short_prefill=short_prefill, deadline=within, **options)
    if seed % 2:  # a past of short outputs, so that the forecast is too low and preemption has to help
        for index in range(80):
            (sequence,) = driver.add([1], 1, max_tokens=30 if index % 2 else 20)
            oracle.add(sequence)
    return draw, driver, oracle


def add_request(
    draw: random.Random, driver: Driver, oracle: Oracle, prefixes: list[list[int]], served: bool = False
) -> None:
    """One request of random shape that fits the pool alone; if `served`, as only servers have them."""
    ledger = driver.state.ledger
    prompt = draw.choice(prefixes)[: draw.randrange(0, 20)] + [draw.randrange(2) for _ in range(draw.randrange(1, 14))]
    length = draw.randrange(1, 30)
    most = max(length, draw.choice([length, 20, 30]))
    score = draw.random() < 0.1
    while ledger.layout.blocks_for(len(prompt) + most) > ledger.num_blocks:
        prompt, most, length = prompt[: len(prompt) // 2 + 1], max(1, most // 2), max(1, length // 2)
    exact = draw.random() < 0.2
    length = most if exact else length
    n = draw.choice([1, 1, 1, 3])
    more: dict[str, Any] = {}
    if served:
        more = {"background": draw.random() < 0.5, "owner": draw.choice(["", "", "a"])}
        more["embed"] = None if score else draw.choice([None] * 8 + ["mean", "last"])
    for sequence in driver.add(prompt, length, n=n, score=score, max_tokens=most, exact=exact, **more):
        oracle.add(sequence)


def share(draw: random.Random, driver: Driver, oracle: Oracle) -> None:
    """Give the next step's background something beside the foreground, or nothing."""
    oracle.background_tokens = draw.choice([0, 0, 1, 4, 20])
    driver.state.limits = replace(driver.state.limits, background_tokens=oracle.background_tokens)


def compare(driver: Driver, oracle: Oracle) -> None:
    state = driver.state
    assert [each.number for each in state.waiting] == [each.number for each in oracle.waiting]
    assert [each.number for each in state.running] == [each.number for each in oracle.running]
    for sequence, record in zip(state.running, oracle.running, strict=True):
        assert (sequence.computed, sequence.tables) == (record.computed, record.tables)
    check_ledger(state.ledger, state.running)
    assert list(state.ledger.pool._evictable) == oracle.stale and state.ledger.pool._free == oracle.free


@pytest.mark.parametrize(
    ("first_seed", "served"),
    [(seed, False) for seed in range(0, 280, 28)] + [(seed, True) for seed in range(0, 112, 28)],
)
def test_plans_and_block_ids_equal_the_oracles(first_seed: int, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "TILE", TILE)
    preemptions = hits = aborts = both = shared = 0
    for seed in range(first_seed, first_seed + 28):
        draw, driver, oracle = make_scene(seed, served)
        prefixes = [[draw.randrange(2) for _ in range(20)] for _ in range(3)]
        arrivals, steps = draw.randrange(20, 60), 0
        while driver.state.sequences or arrivals:
            while arrivals and draw.random() < (0.1 if served else 0.4):
                add_request(draw, driver, oracle, prefixes, served)
                arrivals -= 1
            if driver.state.sequences and draw.random() < (0.01 if served else 0.03):
                number = draw.choice(list(driver.state.sequences))
                driver.abort(driver.state.find(number))
                oracle.remove(number, learn=False)
                aborts += 1
            if served and seed % 4 > 1:
                share(draw, driver, oracle)
            driver.prepare()
            before = snapshot(driver.state) if steps % 7 == 0 else None
            plan = driver.plan()
            assert before is None or before == snapshot(driver.state)
            assert plan == oracle.plan(), f"seed {seed}, step {steps}"
            kinds = {driver.state.find(chunk.sequence).request.background for chunk in plan.chunks}
            shared += len(kinds) > 1
            step_both(driver, oracle, plan)
            compare(driver, oracle)
            preemptions += len(plan.preempt)
            both += bool(plan.preempt and plan.admit)
            hits += sum(each.cached for each in plan.admit)
            steps += 1
        assert driver.state.ledger.used_blocks == 0
    assert preemptions > 5 and hits > 100 and aborts > 5 and (both > 5) == served and (shared > 50) == served


def step_both(driver: Driver, oracle: Oracle, plan: StepPlan) -> None:
    """Execute the plan on both sides; the oracle is told what was sampled and what ended."""
    ended: list[Sequence] = driver.execute(plan)
    oracle.execute(plan)
    oracle.advance(plan)
    gone = {each.number: each for each in ended}
    for chunk in plan.chunks:
        sequence = gone.get(chunk.sequence) or driver.state.sequences[chunk.sequence]
        oracle.find(chunk.sequence).tokens = list(sequence.tokens)
    for number in gone:
        oracle.remove(number, learn=True)
