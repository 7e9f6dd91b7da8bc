"""What a server asks of the schedule: owners, background, short prompts, priorities, conversations and their memory."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from schedule_driver import Driver, make_state

from headrace.cache.checks import check_ledger
from headrace.core import Sequence, StepPlan
from headrace.schedule.apply import apply, expire
from headrace.schedule.fcfs import FirstComeFirstServed
from headrace.schedule.interactive import LONG_AGE, Interactive
from headrace.schedule.pieces import describe_pieces, wanted_rows
from headrace.schedule.state import MOST_PROGRAMS, Limits


def make_driver(num_blocks: int, short_prefill: int | None = None, **options: Any) -> Driver:
    """A server's scheduler over blocks of 4 tokens."""
    state = make_state([None], num_blocks, 4, **{"step_tokens": 64, "max_sequences": 8, **options})
    state.limits = replace(state.limits, short_prefill=short_prefill)
    return Driver(state, schedule=Interactive())


def add_one(driver: Driver, prompt: list[int], length: int = 1, **more: Any) -> Sequence:
    return driver.add(prompt, length, **more)[0]


def admitted(plan: StepPlan) -> list[int]:
    return [each.sequence for each in plan.admit]


def lengths(plan: StepPlan) -> dict[int, int]:
    """Tokens that each sequence computes."""
    return {chunk.sequence: chunk.length for chunk in plan.chunks}


def numbers(sequences: list[Sequence]) -> list[int]:
    return [each.number for each in sequences]


# Owners.


def test_a_prefix_is_found_by_its_owner_only() -> None:
    driver, prompt, found = make_driver(100), list(range(21)), {}
    for name, owner in (("first", "a"), ("other", "b"), ("nobody", ""), ("again", "a")):
        sequence = add_one(driver, prompt, 3, owner=owner)
        driver.run()
        check_ledger(driver.state.ledger, [])
        found[name] = sequence.cached_tokens
    assert found == {"first": 0, "other": 0, "nobody": 0, "again": 20}


def test_nobody_waits_for_a_prefix_that_another_owner_computes() -> None:
    driver = make_driver(100)
    first, other, same = (add_one(driver, list(range(40)), 3, owner=owner) for owner in "aba")
    assert admitted(driver.plan()) == numbers([first, other])
    driver.execute(driver.plan())
    driver.run()
    assert (first.cached_tokens, other.cached_tokens, same.cached_tokens) == (0, 0, 36)
    assert not driver.state.ledger.tree.promises


def test_nothing_of_an_owner_is_left_when_its_blocks_are_evicted() -> None:
    driver = make_driver(100, prefix_retain_bytes=0)
    for owner in ("a", "b", "c"):
        add_one(driver, list(range(21)), 3, owner=owner)
    driver.run()
    tree = driver.state.ledger.tree
    assert not tree.root.children and not tree.places and not tree.promises


def test_planned_background_shares_within_owners() -> None:
    driver = make_driver(500)
    added = [add_one(driver, [7] * 40 + [row], owner="ab"[row % 2], background=True) for row in range(8)]
    order = Interactive().arrange(added, driver.state)
    assert [each.request.owner for each in order] in (list("aaaabbbb"), list("bbbbaaaa"))


# Embeddings.


@pytest.mark.parametrize(("kind", "cached"), [("mean", 0), ("last", 36)])
def test_embeddings_compute_what_they_need_and_generate_nothing(kind: Any, cached: int) -> None:
    driver, prompt = make_driver(100, step_tokens=16), list(range(40))
    for _ in range(2):
        sequence = add_one(driver, prompt, embed=kind)
        rows = 0
        while driver.state.sequences:
            plan = driver.plan()
            rows += sum(len(wanted_rows(chunk, sequence)) for chunk in plan.chunks)
            driver.execute(plan)
        assert sequence.tokens == prompt and sequence.max_length == 40
    assert sequence.cached_tokens == cached and driver.computed_tokens == 80 - cached
    assert rows == (40 if kind == "mean" else 1)
    assert driver.state.lengths.remaining(sequence) == 0


@pytest.mark.parametrize(("fields", "logits"), [({"embed": "mean"}, 0), ({"embed": "last"}, 0), ({"score": True}, 9)])
def test_embeddings_are_counted_without_logits(fields: dict[str, Any], logits: int) -> None:
    driver = make_driver(100)
    sequence, plan = add_one(driver, list(range(10)), **fields), driver.plan()
    apply(plan, driver.state)
    ledger = driver.state.ledger
    (piece,) = describe_pieces([(plan.chunks[0], sequence)], ledger.layout, ledger.pool.references)
    assert (piece.length, piece.wanted) == (10, logits)


# Background.


def test_background_yields_within_a_step_and_goes_on_where_it_was() -> None:
    driver = make_driver(100)
    work = [add_one(driver, [number] * 9, 20, background=True) for number in range(3)]
    for _ in range(5):
        driver.execute(driver.plan())
    before = [(each.computed, [list(table) for table in each.tables]) for each in work]
    asked = add_one(driver, [9] * 9, 6)
    while asked.number in driver.state.sequences:
        plan = driver.plan()
        assert set(lengths(plan)) == {asked.number} and not plan.preempt
        driver.execute(plan)
        check_ledger(driver.state.ledger, driver.state.running)
    assert before == [(each.computed, each.tables) for each in work]
    assert set(lengths(driver.plan())) == set(numbers(work))
    driver.run()
    assert all(each.preemptions == 0 and each.output_length == 20 for each in work)


def test_waiting_background_is_admitted_when_no_foreground_is_left() -> None:
    driver = make_driver(100)
    later = add_one(driver, [1] * 5, 2, background=True)
    asked = add_one(driver, [2] * 5, 2)
    assert admitted(driver.plan()) == [asked.number]
    driver.execute(driver.plan())
    assert admitted(driver.plan()) == []
    driver.execute(driver.plan())
    assert admitted(driver.plan()) == [later.number]


def test_the_newest_background_gives_its_memory_first() -> None:
    """Three rows of 5 blocks each, 2 free; 4 blocks are asked for, then 8 more by decoding."""
    driver = make_driver(17)
    work = [add_one(driver, [number] * 17, 3, background=True) for number in range(3)]
    driver.execute(driver.plan())
    asked = add_one(driver, [9] * 16, 30)
    plan = driver.plan()
    assert plan.preempt == (2,) and admitted(plan) == [asked.number] and lengths(plan) == {asked.number: 16}
    given: list[int] = []
    while asked.number in driver.state.sequences:
        plan = driver.plan()
        given += plan.preempt
        driver.execute(plan)
        check_ledger(driver.state.ledger, driver.state.running)
    assert given == [2, 1] and [each.preemptions for each in work] == [0, 1, 1]
    assert list(driver.state.waiting) == [work[1], work[2]]
    driver.run()
    assert [each.output_length for each in work] == [3, 3, 3]


def test_what_is_asked_for_finds_the_prefix_of_the_background_that_it_displaces() -> None:
    """The blocks change hands, though blocks that nobody holds are evicted at once."""
    driver = make_driver(12, prefix_retain_bytes=0)
    work = add_one(driver, [*range(32), 1], 8, background=True)
    driver.execute(driver.plan())
    asked = add_one(driver, [*range(32), *range(100, 113)], 4)
    plan = driver.plan()
    assert plan.preempt == (work.number,) and [each.cached for each in plan.admit] == [32]
    while asked.number in driver.state.sequences:
        driver.execute(driver.plan())
        check_ledger(driver.state.ledger, driver.state.running)
    assert asked.cached_tokens == 32
    driver.run()
    assert work.output_length == 8


def test_places_are_counted_without_paused_background() -> None:
    driver = make_driver(200, max_sequences=3)
    work = driver.add([1] * 5, 20, n=3, background=True)
    driver.execute(driver.plan())
    driver.execute(driver.plan())
    asked = [add_one(driver, [number] * 5, 3) for number in range(2, 7)]
    assert admitted(driver.plan()) == numbers(asked[:3])
    driver.run()
    assert all(each.preemptions == 0 for each in work)


def test_nobody_waits_for_a_prefix_that_paused_background_would_compute() -> None:
    driver, prompt = make_driver(200, step_tokens=16), list(range(60))
    work = add_one(driver, prompt, 3, background=True)
    driver.execute(driver.plan())
    first, second = add_one(driver, prompt, 3), add_one(driver, prompt, 3)
    # What the background has computed is found; what it was about to compute, the first does, and the second waits.
    assert admitted(driver.plan()) == [first.number]
    driver.execute(driver.plan())
    assert admitted(driver.plan()) == []
    driver.run()
    assert (first.cached_tokens, second.cached_tokens, work.output_length) == (16, 56, 3)
    # Where it paused, the background goes on by itself.
    assert driver.computed_tokens == 60 + (60 - 16) + (60 - 56) + 3 * 2


def test_background_shares_do_not_keep_foreground_out() -> None:
    """Foreground that fits without the background is admitted, however the background's blocks are shared."""
    driver = make_driver(24)
    driver.add(list(range(60)), 4, n=4, background=True, exact=True)
    for _ in range(3):
        driver.execute(driver.plan())
    assert driver.state.ledger.shared > 10
    asked = [add_one(driver, [100 + number] * 20, 8, exact=True) for number in range(3)]
    plan = driver.plan()
    assert admitted(plan) == numbers(asked) and plan.preempt
    driver.run()
    assert all(each.preemptions == 0 for each in asked)


@pytest.mark.parametrize("seed", range(6))
def test_all_finish_in_little_memory(seed: int) -> None:
    draw = random.Random(seed)
    driver = make_driver(40, short_prefill=draw.choice([None, 8]), step_tokens=draw.choice([7, 32]))
    waits: list[int] = []
    for _ in range(300):
        if draw.random() < 0.3:
            prompt = [draw.randrange(2) for _ in range(draw.randrange(1, 60))]
            driver.add(prompt, draw.randrange(1, 30), max_tokens=30, background=draw.random() < 0.6)
        foreground = any(not each.request.background for each in driver.state.sequences.values())
        plan = driver.plan()
        computed = [driver.state.find(chunk.sequence).request.background for chunk in plan.chunks]
        assert bool(computed) == bool(driver.state.sequences) and not (foreground and any(computed))
        waits.append(len(driver.state.waiting))
        driver.execute(plan)
        check_ledger(driver.state.ledger, driver.state.running)
    driver.run()
    assert max(waits) > 3 and driver.state.background == 0 and driver.state.ledger.used_blocks == 0


# Short prompts.


def test_a_huge_prompt_does_not_hold_a_short_one_back() -> None:
    driver = make_driver(1000, short_prefill=16, step_tokens=40)
    huge = add_one(driver, list(range(1000)), 2)
    decoder = add_one(driver, [1, 2, 3], 60)
    for _ in range(3):
        driver.execute(driver.plan())
    assert lengths(driver.plan()) == {decoder.number: 1, huge.number: 39}
    short = [add_one(driver, [number] * 12, 2) for number in (7, 8, 9)]
    # 39 tokens are left: 19 for the huge one, the others for those that come, the last of them in part.
    assert lengths(driver.plan()) == {decoder.number: 1, huge.number: 19, short[0].number: 12, short[1].number: 8}
    driver.execute(driver.plan())
    second = lengths(driver.plan())
    assert second[huge.number] == 19 and second[short[1].number] == 4 and second[short[2].number] == 12
    driver.execute(driver.plan())
    assert all(each.output_length >= 1 for each in short)
    driver.execute(driver.plan())
    # Alone, it has everything again.
    assert lengths(driver.plan()) == {decoder.number: 1, huge.number: 39}


def test_a_long_prompt_goes_on_beside_any_number_of_short_ones() -> None:
    driver = make_driver(1000, short_prefill=8, step_tokens=2, max_sequences=2)
    long = add_one(driver, list(range(30)), 1)
    driver.execute(driver.plan())
    before = long.computed
    for number in range(20):
        add_one(driver, [100 + number] * 8, 1)
        driver.execute(driver.plan())
    assert long.computed == min(before + 20, 30) or long.number not in driver.state.sequences


def test_what_the_cache_has_makes_a_prompt_short() -> None:
    driver = make_driver(1000, short_prefill=8, step_tokens=40)
    add_one(driver, list(range(100)), 1)
    driver.run()
    huge = add_one(driver, [5] * 300, 1)
    driver.execute(driver.plan())
    turn = add_one(driver, list(range(104)), 1)
    plan = driver.plan()
    assert lengths(plan) == {huge.number: 20, turn.number: 4}


def measure_waits(driver: Driver, requests: list[tuple[float, int]]) -> dict[bool, list[float]]:
    """Time to the first token by whether a prompt is long, on a clock where a step takes 20 and 1 a token."""
    now = 0.0
    found: dict[bool, list[float]] = {False: [], True: []}
    open_since: dict[int, tuple[float, bool]] = {}
    queue = list(reversed(requests))
    while queue or driver.state.sequences:
        while queue and (queue[-1][0] <= now or not driver.state.sequences):
            arrival, tokens = queue.pop()
            now = max(now, arrival)
            open_since[add_one(driver, [driver.numbers] * tokens, 8).number] = arrival, tokens > 256
        plan = driver.plan()
        driver.execute(plan)
        now += 20 + sum(chunk.length for chunk in plan.chunks)
        for number, (arrival, long) in list(open_since.items()):
            sequence = driver.state.sequences.get(number)
            if sequence is None or sequence.output_length:
                found[long].append(now - arrival)
                del open_since[number]
    return found


def test_lanes_shorten_short_waits_much_and_lengthen_long_ones_little() -> None:
    """At a load of 0.8; a fifth of the prompts, most of the tokens, is long."""
    draw, requests, now = random.Random(4), [], 0.0
    for _ in range(400):
        now += draw.expovariate(1 / 850)
        requests.append((now, draw.randrange(8, 257) if draw.random() < 0.8 else draw.randrange(1000, 4000)))
    waits = {}
    for lanes in (False, True):
        driver = make_driver(20_000, 256 if lanes else None, step_tokens=512, max_sequences=64)
        driver.schedule = Interactive() if lanes else FirstComeFirstServed()
        waits[lanes] = measure_waits(driver, requests)
    shorts = {lanes: sorted(found[False])[int(0.99 * len(found[False]))] for lanes, found in waits.items()}
    longs = {lanes: sum(found[True]) / len(found[True]) for lanes, found in waits.items()}
    assert shorts[True] <= 0.5 * shorts[False], (shorts, longs)
    assert longs[True] <= 1.2 * longs[False], (shorts, longs)


# The order.


def test_a_long_prompt_is_overtaken_by_so_many_short_ones_and_no_more() -> None:
    driver = make_driver(1000, short_prefill=8)
    long = add_one(driver, [1] * 100)
    short = [add_one(driver, [2] * 8) for _ in range(3 * LONG_AGE)]
    order = Interactive().arrange(list(driver.state.waiting), driver.state)
    assert order.index(long) == LONG_AGE - 1 and order[: LONG_AGE - 1] == short[: LONG_AGE - 1]
    driver.state.limits = Limits(64, 8)
    assert Interactive().arrange(list(driver.state.waiting), driver.state)[0] is long


def test_a_long_prompt_is_admitted_while_short_ones_go_on_coming() -> None:
    driver = make_driver(1000, short_prefill=8, max_sequences=1)
    long = add_one(driver, [1] * 100)
    for number in range(4 * LONG_AGE):
        driver.add([number] * 8, 1)
        driver.add([number] * 7, 1)
        driver.execute(driver.plan())
        if long in driver.state.running:
            break
    assert long in driver.state.running and len(driver.finished) <= LONG_AGE


def test_priority_then_programs_by_their_beginning_then_background() -> None:
    driver = make_driver(1000)
    turn = add_one(driver, [1] * 5, 1, program="chat")
    driver.run()
    later = add_one(driver, [2] * 5, 1)
    work = add_one(driver, [3] * 5, 1, background=True, priority=-5)
    urgent = add_one(driver, [4] * 5, 1, priority=-1)
    next_turn = add_one(driver, [5] * 5, 1, program="chat")
    stranger = add_one(driver, [6] * 5, 1, program="chat", owner="another")
    idle = add_one(driver, [7] * 5, 1, priority=3)
    driver.prepare()
    order = list(driver.state.waiting)
    assert order == [urgent, next_turn, later, stranger, idle, work] and turn.number == 0


def test_preempted_ones_stay_first_within_foreground_and_background() -> None:
    driver = make_driver(1000)
    work, asked = add_one(driver, [1] * 5, background=True), add_one(driver, [2] * 5, priority=9)
    later, more = add_one(driver, [3] * 5), add_one(driver, [4] * 5, background=True)
    driver.prepare()
    work.preemptions = asked.preemptions = 1
    urgent, other = add_one(driver, [5] * 5, priority=-1), add_one(driver, [6] * 5, background=True)
    driver.prepare()
    assert list(driver.state.waiting) == [asked, urgent, later, work, more, other]


def test_the_beginnings_of_so_many_programs_are_remembered() -> None:
    driver = make_driver(1000)
    for number in range(MOST_PROGRAMS + 1):
        add_one(driver, [1], program=str(number))
        if number == 1:
            add_one(driver, [1], program="0")
    programs = driver.state.programs
    assert len(programs) == MOST_PROGRAMS and ("", "1") not in programs and programs["", "0"] == 0


# Conversations' memory.


def converse(driver: Driver, programs: int, turns: int, draw: random.Random) -> list[Sequence]:
    """Programs whose turns each add to what was said, with pauses between; the turns after their first."""
    ready = {number: (float(number), 0, [1000 + number] * 20) for number in range(programs)}
    running: dict[int, tuple[Sequence, int]] = {}
    later: list[Sequence] = []
    for _ in range(20_000):
        for program, (start, turn, prompt) in list(ready.items()):
            if start <= driver.now:
                del ready[program]
                sequence = add_one(driver, prompt, 6, program=str(program))
                running[program] = sequence, turn
                later += [sequence] * (turn > 0)
        if driver.state.sequences:
            driver.execute(driver.plan())
            check_ledger(driver.state.ledger, driver.state.running)
        else:
            driver.now += 1.0
        for program, (sequence, turn) in list(running.items()):
            if sequence.number not in driver.state.sequences:
                del running[program]
                if turn + 1 < turns:
                    said = [*sequence.tokens, *(draw.randrange(1000) for _ in range(6))]
                    ready[program] = driver.now + draw.randrange(1, 20), turn + 1, said
        if not ready and not running:
            return later
    raise AssertionError(f"{len(ready)} programs pause and {len(running)} run for ever")


def test_kept_conversations_are_found_again() -> None:
    found = {}
    for keep_seconds in (0.0, 30.0):
        # What nobody holds is evicted at once, but for what is kept.
        driver = make_driver(200, prefix_retain_bytes=0)
        driver.keep_seconds = keep_seconds
        later = converse(driver, 6, 4, random.Random(1))
        found[keep_seconds] = sum(each.cached_tokens for each in later) / sum(each.prompt_length for each in later)
    assert found[0.0] < 0.05 and found[30.0] > 0.7


@pytest.mark.parametrize("keep_seconds", [0.0, 5.0, 1e9])
def test_many_conversations_in_little_memory_finish(keep_seconds: float) -> None:
    """The longest conversation fills most of the pool, and kept ones are never let go by time alone."""
    driver = make_driver(24, step_tokens=16, prefix_retain_bytes=8)
    driver.keep_seconds = keep_seconds
    later = converse(driver, 30, 5, random.Random(2))
    assert len(later) == 30 * 4 and len(driver.finished) == 150
    expire(driver.state, 1e10)
    assert len(driver.state.ledger.keeps) == 0 and not driver.state.ledger.pool.keeps
    assert driver.state.ledger.pool.evictable <= 8
    check_ledger(driver.state.ledger, [])
