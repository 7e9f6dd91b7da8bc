"""Background beside foreground that never ends: it gets on, and the foreground's own steps stay as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from schedule_driver import Driver, make_state

from headrace.cache.checks import check_ledger
from headrace.core import Sequence, StepPlan
from headrace.schedule.interactive import Interactive
from headrace.schedule.state import Limits
from headrace.schedule.step import plan_step


def make_driver(num_blocks: int, step_tokens: int = 32, max_sequences: int = 8) -> Driver:
    """A server's scheduler over blocks of 4 tokens."""
    state = make_state([None], num_blocks, 4, step_tokens=step_tokens, max_sequences=max_sequences)
    return Driver(state, schedule=Interactive())


def share(driver: Driver, tokens: int) -> None:
    driver.state.limits = replace(driver.state.limits, background_tokens=tokens)


def step(driver: Driver, clients: int, draw: random.Random) -> StepPlan:
    """One step beside clients of whom each asks again as soon as it is answered."""
    present = len(driver.state.sequences) - driver.state.background
    for _ in range(clients - present):
        driver.add([draw.randrange(1000) for _ in range(draw.randrange(4, 12))], draw.randrange(2, 12))
    plan = driver.plan()
    driver.execute(plan)
    check_ledger(driver.state.ledger, driver.state.running)
    return plan


def split(driver: Driver, plan: StepPlan) -> tuple[StepPlan, StepPlan]:
    """What a plan that is not executed yet does for the foreground, and what for the background."""

    def part(background: bool) -> StepPlan:
        def mine(number: int) -> bool:
            return driver.state.find(number).request.background is background

        return StepPlan(
            tuple(each for each in plan.chunks if mine(each.sequence)),
            tuple(each for each in plan.admit if mine(each.sequence)),
            tuple(each for each in plan.preempt if mine(each)),
        )

    return part(False), part(True)


def count_steps(driver: Driver, work: list[Sequence], clients: int, every: int, tokens: int) -> int:
    """Steps until the work is done, if every so many of them have so many tokens for the background."""
    draw = random.Random(3)
    for count in range(1, 2000):
        share(driver, tokens if count % every == 0 else 0)
        step(driver, clients, draw)
        if not any(each.number in driver.state.sequences for each in work):
            return count
    return 0


def test_background_ends_beside_foreground_that_never_does() -> None:
    """A prompt of 50 tokens takes 7 shared steps of 8 tokens, the last of which samples; 19 more the other tokens."""
    for every in (1, 5):
        driver = make_driver(200)
        (work,) = driver.add(list(range(50)), 20, background=True)
        assert count_steps(driver, [work], clients=6, every=every, tokens=8) == 26 * every
        assert work.output_length == 20 and work.preemptions == 0


def test_without_a_share_it_starves() -> None:
    driver = make_driver(200)
    work = driver.add(list(range(50)), 20, background=True)
    assert count_steps(driver, work, clients=6, every=1, tokens=0) == 0
    assert work[0].computed == 0


def test_more_background_than_fits_a_step_ends_the_oldest_first() -> None:
    driver = make_driver(400)
    work = [driver.add([row] * 9, 10, background=True)[0] for row in range(20)]
    assert 0 < count_steps(driver, work, clients=6, every=1, tokens=3) <= 20 * (9 + 10) // 3 + 20
    ended = [each.number for each in driver.finished if each.request.background]
    assert ended == [each.number for each in work]


def test_prefill_that_fills_every_step_does_not_keep_background_out() -> None:
    driver, draw = make_driver(1000, step_tokens=16), random.Random(1)
    (work,) = driver.add(list(range(50)), 20, background=True)
    share(driver, 8)
    for _ in range(40):
        driver.add([draw.randrange(1000) for _ in range(30)], 1)
        driver.execute(driver.plan())
    assert work in driver.finished and len(driver.state.waiting) > 10


def test_background_is_not_admitted_while_foreground_waits_for_room() -> None:
    """For a place, then for memory; and it is as soon as the foreground has what it wants."""
    for driver in (make_driver(200, max_sequences=2), make_driver(13)):
        share(driver, 8)
        (work,) = driver.add([7], 2, background=True)
        asked = [driver.add([number] * 9, 12)[0] for number in range(3)]
        driver.execute(driver.plan())
        while asked[2] in driver.state.waiting:
            assert work.computed == 0
            driver.execute(driver.plan())
        driver.execute(driver.plan())
        assert asked[2] in driver.state.running and work.computed > 0


def test_foreground_finds_nothing_of_its_own_displaced() -> None:
    """Memory for the foreground alone: what the background took meanwhile it gives back."""
    driver = make_driver(20)
    share(driver, 8)
    asked = driver.add(list(range(8)), 40)[0]
    work = [driver.add([row] * 9, 8, background=True)[0] for row in (100, 200)]
    while asked.number in driver.state.sequences:
        plan = driver.plan()
        assert asked.number in [chunk.sequence for chunk in plan.chunks]
        driver.execute(plan)
    assert driver.now == 40 and asked.preemptions == 0
    driver.run()
    assert all(each.output_length == 8 for each in work)


def worlds(seeds: range) -> Iterator[tuple[random.Random, Driver]]:
    """Random schedulers in little memory."""
    for seed in seeds:
        draw = random.Random(seed)
        driver = make_driver(draw.choice([20, 40, 80]), draw.choice([5, 16, 40]), draw.choice([2, 8]))
        driver.state.limits = replace(driver.state.limits, short_prefill=draw.choice([None, 8]))
        yield draw, driver


@pytest.mark.parametrize("first_seed", [0, 10, 20])
def test_the_foregrounds_part_of_every_plan_is_what_it_was(first_seed: int) -> None:
    """Whatever the share, in the same state; the background keeps to its tokens, and everything ends."""
    shared = admitted = 0
    for draw, driver in worlds(range(first_seed, first_seed + 10)):
        for _ in range(200):
            if draw.random() < 0.3:
                prompt = [draw.randrange(2) for _ in range(draw.randrange(1, 40))]
                driver.add(prompt, draw.randrange(1, 30), max_tokens=30, background=draw.random() < 0.6)
            tokens = draw.choice([0, 1, 7, 30])
            share(driver, tokens)
            clients = len(driver.state.sequences) > driver.state.background
            plan = driver.plan()
            foreground, background = split(driver, plan)
            alone = split(driver, plan_step(driver.state, replace(driver.state.limits, background_tokens=0)))
            assert foreground == alone[0]
            assert background.preempt[: len(alone[1].preempt)] == alone[1].preempt
            if clients:
                assert sum(chunk.length for chunk in background.chunks) <= tokens
                shared += bool(background.chunks)
                admitted += len(background.admit)
            driver.execute(plan)
            check_ledger(driver.state.ledger, driver.state.running)
        driver.run()
        assert driver.state.background == 0 and driver.state.ledger.used_blocks == 0
    assert shared > 100 and admitted > 10


def test_what_was_computed_for_the_background_is_counted() -> None:
    driver = make_driver(200)
    share(driver, 8)
    driver.add(list(range(10)), 4)
    driver.add(list(range(100, 120)), 5, background=True)
    driver.run()
    assert driver.state.background_computed == 20 + 4 and driver.computed_tokens == 20 + 4 + 10 + 3


def test_a_share_below_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="background_tokens must be at least 0, got -1"):
        Limits(8, 2, background_tokens=-1)
