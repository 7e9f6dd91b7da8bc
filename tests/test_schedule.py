"""What every plan promises under every schedule, for any arrivals, lengths, aborts and budgets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_driver import Driver, make_state, snapshot
from step_times import SLOW_PAIRS

from headrace.cache.checks import check_ledger
from headrace.core import Admission, Chunk, StepPlan
from headrace.meter.operations import Piece
from headrace.meter.step_time import TILE
from headrace.schedule.apply import apply
from headrace.schedule.budget import Deadline
from headrace.schedule.choice import SCHEDULES
from headrace.schedule.state import Limits

WINDOWS: list[list[int | None]] = [[None], [None, None], [7], [5, None], [4, 4, 11, 11, None, None]]


@st.composite
def piles(draw: st.DrawFn) -> dict[str, Any]:
    """A pool, limits, and requests with their arrival and abort times."""
    request = st.fixed_dictionaries(
        {
            "arrival": st.integers(0, 30),
            "prompt": st.lists(st.integers(0, 1), min_size=1, max_size=40),
            "length": st.integers(1, 24),
            "slack": st.integers(0, 24),
            "n": st.sampled_from([1, 1, 1, 4]),
            "kind": st.sampled_from([{}] * 5 + [{"score": True}, {"embed": "mean"}, {"embed": "last"}]),
            "exact": st.booleans(),
            "abort_after": st.none() | st.integers(0, 30),
            "background": st.booleans(),
            "priority": st.integers(-1, 1),
            "program": st.sampled_from(["", "", "one", "two"]),
            "owner": st.sampled_from(["", "", "another"]),
        }
    )
    return {
        "windows": draw(st.sampled_from(WINDOWS)),
        "block_size": draw(st.integers(2, 6)),
        "spare_blocks": draw(st.integers(0, 60)),
        "step_tokens": draw(st.integers(1, 50)),
        "max_sequences": draw(st.integers(1, 12)),
        "prefix_cache": draw(st.booleans()),
        "short_past": draw(st.booleans()),
        "schedule": draw(st.sampled_from(sorted(SCHEDULES))),
        "short_prefill": draw(st.none() | st.integers(0, 20)),
        "seconds": draw(st.sampled_from([None, None, 5.0, 60.0, 150.0])),
        "keep_seconds": draw(st.sampled_from([0.0, 3.0, 1000.0])),
        "requests": draw(st.lists(request, min_size=1, max_size=25)),
    }


def open_pile(pile: dict[str, Any]) -> Driver:
    """A pool that the largest request just fits, and what is to spare."""
    options = {name: pile[name] for name in ("step_tokens", "max_sequences", "prefix_cache")}
    probe = make_state(pile["windows"], 1, pile["block_size"]).ledger
    for request in pile["requests"]:
        request["most"] = request["length"] + (0 if request["exact"] else request["slack"])
    fits = max(probe.layout.blocks_for(len(each["prompt"]) + each["most"]) for each in pile["requests"])
    state = make_state(pile["windows"], fits + pile["spare_blocks"], pile["block_size"], **options)
    within = pile["seconds"] and Deadline(pile["seconds"], SLOW_PAIRS)
    state.limits = replace(state.limits, short_prefill=pile["short_prefill"], deadline=within)
    driver = Driver(state, vocabulary=2, schedule=SCHEDULES[pile["schedule"]](), keep_seconds=pile["keep_seconds"])
    if pile["short_past"]:
        for _ in range(40):
            driver.add([1], 1, max_tokens=2)
        check_ledger(driver.state.ledger, [])
        driver.run()
        driver.finished.clear()
    return driver


def check_plan(driver: Driver, plan: StepPlan) -> None:
    """Budgets of tokens, sequences and blocks; decodes first; the oldest is never preempted.

    Beside foreground, background computes nothing and gives way first.
    """
    state, limits = driver.state, driver.state.limits
    foreground = any(not each.request.background for each in state.sequences.values())
    computing = [each for each in state.running if not (foreground and each.request.background)]
    paused = [each.number for each in state.running if each not in computing]
    running = [each for each in computing if each.number not in plan.preempt]
    if foreground:
        assert not any(state.find(each.sequence).request.background for each in (*plan.chunks, *plan.admit))
    assert sum(chunk.length for chunk in plan.chunks) <= limits.step_tokens
    assert len(running) + len(plan.admit) <= min(limits.max_sequences, limits.step_tokens)
    assert plan.chunks, "nothing is computed although something waits or runs"
    victims = len([number for number in plan.preempt if number in paused])
    assert list(plan.preempt[:victims]) == paused[::-1][:victims]
    numbers = [each.number for each in computing]
    if len(plan.preempt) > victims:
        assert victims == len(paused) and not plan.admit
        order = [numbers.index(number) for number in plan.preempt[victims:]]
        assert order == sorted(order, reverse=True) and 0 not in order
    decodes = [each.number for each in running if len(each.tokens) - each.computed == 1]
    assert [chunk.sequence for chunk in plan.chunks][: len(decodes)] == decodes
    assert len({chunk.sequence for chunk in plan.chunks}) == len(plan.chunks)


def check_time(driver: Driver, plan: StepPlan) -> None:
    """Beyond a tile of prompts there are no more than there is time for."""
    state, within = driver.state, driver.state.limits.deadline
    scheduled = [(chunk, state.find(chunk.sequence)) for chunk in plan.chunks]
    decodes = [each for chunk, each in scheduled if each in state.running and len(each.tokens) - each.computed == 1]
    if within is None or len(decodes) == len(scheduled):
        return
    pieces = [
        Piece(chunk.start, chunk.length, each.request.generates or each not in decodes, False)
        for chunk, each in scheduled
    ]
    in_time = within.step_time.predict(pieces) <= within.seconds
    assert in_time or sum(chunk.length for chunk, each in scheduled if each not in decodes) <= TILE


@settings(max_examples=150, deadline=None)
@given(piles())
def test_any_pile_finishes_within_its_budgets_and_leaks_nothing(pile: dict[str, Any]) -> None:
    driver = open_pile(pile)
    state, requests = driver.state, sorted(pile["requests"], key=lambda each: each["arrival"])
    aborts: list[tuple[int, int]] = []
    expected, step = 0, 0
    # Alone and one token at a time, every sequence would take this many steps; preempted work is done again.
    bound = 60 + 4 * sum(each["n"] * (len(each["prompt"]) + each["most"]) for each in requests)
    while requests or state.sequences:
        while requests and (requests[0]["arrival"] <= step or not state.sequences):
            each = requests.pop(0)
            fields = {name: each[name] for name in ("background", "priority", "program", "owner")} | each["kind"]
            added = driver.add(
                each["prompt"], each["length"], each["n"], max_tokens=each["most"], exact=each["exact"], **fields
            )
            expected += each["n"]
            if each["abort_after"] is not None:
                aborts.append((step + each["abort_after"], added[0].number))
        for _, number in [entry for entry in aborts if entry[0] == step]:
            if number in state.sequences:
                driver.abort(state.find(number))
                expected -= 1
        if state.sequences:
            driver.prepare()
            before = snapshot(state)
            plan = driver.plan()
            assert plan == driver.plan() and snapshot(state) == before
            check_plan(driver, plan)
            check_time(driver, plan)
            driver.execute(plan)
            check_ledger(state.ledger, state.running)
        step += 1
        assert step <= bound
    assert len(driver.finished) == expected
    assert state.ledger.used_blocks == 0 and state.ledger.free_blocks == state.ledger.num_blocks
    assert not state.running and not state.waiting and not state.ledger.tree.promises
    if not pile["prefix_cache"]:
        assert len(state.ledger.pool._free) == state.ledger.num_blocks


@pytest.mark.parametrize("windows", WINDOWS)
def test_certain_lengths_never_need_preemption(windows: list[int | None]) -> None:
    """The outlook is an upper bound: with lengths known, admission alone keeps the budget, and does use the pool."""
    alone = make_state(windows, 1, 4).ledger.layout.blocks_for(62, 64)
    state = make_state(windows, 3 * alone, 4, step_tokens=64, max_sequences=40)
    driver, most = Driver(state), 0
    for index in range(80):
        driver.add([index % 3] * (index * 7 % 30) + [index], 1 + index * 5 % 31, n=1 + index % 2, exact=True)
    while state.sequences:
        plan = driver.plan()
        assert not plan.preempt
        driver.execute(plan)
        most = max(most, state.ledger.used_blocks)
    assert most > 0.6 * state.ledger.num_blocks


@pytest.mark.parametrize("windows", [[None], [64, None]])
def test_an_equal_prefix_is_computed_exactly_once(windows: list[int | None]) -> None:
    prefix = [index % 97 for index in range(512)]
    state = make_state(windows, 2000, 32, step_tokens=100, max_sequences=64)
    driver = Driver(state)
    for index in range(16):
        driver.add([*prefix, 1000 + index, 7, 8], 5)
    driver.run()
    assert driver.computed_tokens == 512 + 16 * (3 + 4)
    assert sorted(each.cached_tokens for each in driver.finished) == [0] + [512] * 15


def test_the_choices_of_one_request_share_its_prefill() -> None:
    driver = Driver(make_state([None], 200, 16, step_tokens=64, max_sequences=64))
    driver.add(list(range(100)), 4, n=8)
    first = driver.plan()
    assert [each.sequence for each in first.admit] == [0]
    driver.execute(first)
    driver.run()
    # 96 tokens fill whole blocks; each choice computes the 4 after them and 3 of its own.
    assert driver.computed_tokens == 96 + 8 * (4 + 3)


def test_others_pass_those_that_wait_for_a_prefix() -> None:
    driver = Driver(make_state([None], 200, 16, step_tokens=64, max_sequences=64))
    driver.add(list(range(40)), 4, n=2)
    driver.add([5, 6, 7], 4)
    assert [(each.sequence, each.cached) for each in driver.plan().admit] == [(0, 0), (2, 0)]


def test_without_prefix_cache_nothing_waits_and_nothing_is_kept() -> None:
    driver = Driver(make_state([None], 200, 16, step_tokens=640, max_sequences=64, prefix_cache=False))
    driver.add(list(range(100)), 4, n=6)
    assert len(driver.plan().admit) == 6
    driver.run()
    assert driver.computed_tokens == 6 * 103 and not driver.state.ledger.tree.places


def test_a_promise_ends_with_its_sequence() -> None:
    driver = Driver(make_state([None], 200, 16, step_tokens=32, max_sequences=64))
    first, second = driver.add(list(range(160)), 4, n=2)
    driver.execute(driver.plan())
    assert [each.sequence for each in driver.plan().admit] == []
    driver.abort(first)
    (admission,) = driver.plan().admit
    assert (admission.sequence, admission.cached) == (second.number, 32)


def test_a_long_prefill_never_stops_decodes() -> None:
    driver = Driver(make_state([None], 400, 16, step_tokens=32, max_sequences=8))
    decoders = driver.add([1, 2, 3], 200, n=4)
    while any(each.output_length == 0 for each in decoders):
        driver.execute(driver.plan())
    driver.add(list(range(1500)), 1)
    steps = 0
    while any(len(each.request.prompt_token_ids) == 1500 for each in driver.state.sequences.values()):
        plan = driver.plan()
        assert [chunk.sequence for chunk in plan.chunks[:4]] == [each.number for each in decoders]
        assert sum(chunk.length for chunk in plan.chunks) == 32 or steps == 1500 // 28
        driver.execute(plan)
        steps += 1
    assert steps == 1500 // 28 + 1


def test_the_newest_is_preempted_and_goes_to_the_front() -> None:
    """Two sequences with wrongly short forecasts outgrow a pool of 16 blocks: the newer one gives way."""
    state = make_state([None], 16, 4, step_tokens=64, max_sequences=8)
    driver = Driver(state)
    driver.add([1], 1, n=40, max_tokens=40)
    driver.run()
    old, new, later = (driver.add([number] * 9, 40, max_tokens=40)[0] for number in (2, 3, 4))
    plan = driver.plan()
    assert [each.sequence for each in plan.admit] == [old.number, new.number, later.number]
    while not plan.preempt:
        driver.execute(plan)
        check_ledger(state.ledger, state.running)
        plan = driver.plan()
    assert plan.preempt == (later.number,) and not plan.admit
    driver.execute(plan)
    assert list(state.waiting) == [later] and later.computed == 0 and later.preemptions == 1 and not later.tables
    driver.run()
    assert old.preemptions == 0 and old.output_length == new.output_length == later.output_length == 40
    assert later.cached_tokens == 0


def test_blocks_that_victims_share_are_free_when_the_last_of_them_goes() -> None:
    """Five blocks: one each of two old sequences, two that two newer ones share, one free. Both old ones need one."""
    driver = Driver(make_state([None], 5, 4, step_tokens=64, max_sequences=8))
    driver.add([7] * 4 + [9], 1)
    driver.run()
    old, second = driver.add([1] * 4, 9)[0].number, driver.add([2] * 4, 9)[0].number
    new, newer = (each.number for each in driver.add([7] * 4 + [8] * 4, 9, n=2))
    admitted = (Admission(old, 0), Admission(second, 0), Admission(new, 4), Admission(newer, 4))
    driver.execute(StepPlan(tuple(Chunk(each.sequence, each.cached, 4) for each in admitted), admitted))
    assert driver.state.ledger.used_blocks == 4
    plan = driver.plan()
    assert plan.preempt == (newer, new) and [chunk.sequence for chunk in plan.chunks] == [old, second]
    driver.execute(plan)
    check_ledger(driver.state.ledger, driver.state.running)


def test_a_preempted_sequence_finds_what_it_generated() -> None:
    driver = Driver(make_state([None], 100, 4, step_tokens=16, max_sequences=8))
    old, new = driver.add([1], 30)[0], driver.add([2], 30)[0]
    while new.output_length < 12:
        driver.execute(driver.plan())
    apply(StepPlan(preempt=(new.number,)), driver.state)
    assert list(driver.state.waiting) == [new] and (new.computed, new.preemptions) == (0, 1)
    (admission,) = driver.plan().admit
    assert admission.cached == 12
    driver.run()
    assert new.cached_tokens == 0 and old.output_length == new.output_length == 30


def test_scores_compute_every_token_and_lend_their_blocks() -> None:
    driver = Driver(make_state([None], 100, 16, step_tokens=64, max_sequences=8))
    prompt = list(range(70))
    for _ in range(2):
        driver.add(prompt, score=True)
        driver.run()
    assert driver.computed_tokens == 140
    driver.add(prompt, 1)
    driver.run()
    assert driver.computed_tokens == 140 + 6


def test_lowered_limits_serve_the_oldest_first() -> None:
    driver = Driver(make_state([None], 100, 4, step_tokens=16, max_sequences=8))
    added = driver.add([1, 2, 3], 6, n=8)
    driver.execute(driver.plan())
    driver.state.limits = Limits(3, 2)
    assert [chunk.sequence for chunk in driver.plan().chunks] == [each.number for each in added[:3]]
    driver.run()


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Limits(0, 1)
    driver = Driver(make_state([None], 10))
    (sequence,) = driver.add([1], 1)
    with pytest.raises(ValueError, match="is taken"):
        driver.state.add(sequence)
