"""The past (length forecast) and the future (peak memory), against brute force."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from schedule_driver import Driver, make_state

from headrace.cache.layout import CacheLayout, Shrink
from headrace.cache.ledger import KVLedger
from headrace.cache.prefix import Hit
from headrace.core import Constraint, Request, SamplingParams, Sequence
from headrace.schedule.forecast import Demand, Outlook, future_peak
from headrace.schedule.lengths import (
    ADMISSIONS,
    MOST_KINDS,
    AggressiveLengths,
    ConservativeLengths,
    LengthForecast,
    Lengths,
    LengthWindow,
    OracleLengths,
)

YES_NO = Constraint("choice", '["yes", "no"]')


def make_sequence(
    number: int,
    generated: int,
    max_tokens: int = 100,
    ignore_eos: bool = False,
    score: bool = False,
    constraint: Constraint | None = None,
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, constraint=constraint)
    return Sequence(Request("r", (1, 2), params, score), 0, number, [1, 2, *range(generated)])


def learn(lengths: list[int], context_length: int | None = None, max_tokens: int = 10_000) -> LengthForecast:
    forecast = LengthForecast(context_length)
    for length in lengths:
        forecast.record(make_sequence(0, length, max_tokens))
    return forecast


def simulate(demands: list[Demand], shared: int) -> int:
    """Step by step: each demand grows while it lasts, then is gone."""
    peak = shared
    for step in range(max((each.remaining for each in demands), default=-1) + 1):
        peak = max(peak, shared + sum(each.held + each.rate * step for each in demands if each.remaining >= step))
    return peak


def test_future_peak_equals_simulation() -> None:
    draw = random.Random(0)
    for _ in range(1000):
        demands = [
            Demand(draw.randrange(40), draw.randrange(100), draw.choice([0, 1, 1, 2, 5]))
            for _ in range(draw.randrange(12))
        ]
        shared = draw.randrange(50)
        assert future_peak(demands, shared) == simulate(demands, shared)


def test_peak_of_the_papers_kind_of_batch() -> None:
    """Three requests of 4, 3 and 2 tokens with 1, 2 and 3 to go: 12 tokens when the second ends, not 9 + 6."""
    assert future_peak([Demand(1, 4, 1), Demand(2, 3, 1), Demand(3, 2, 1)]) == 12


def test_forecast_is_conservative_until_it_knows() -> None:
    assert learn([3] * 31).remaining(make_sequence(1, 0)) == 100
    assert learn([3] * 32).remaining(make_sequence(1, 0)) == 3
    assert learn([3] * 32).remaining(make_sequence(1, 1)) == 2
    assert learn([3] * 32).remaining(make_sequence(1, 3)) == 97
    assert learn([3] * 32).remaining(make_sequence(1, 0, ignore_eos=True)) == 100
    assert learn([300] * 32).remaining(make_sequence(1, 40)) == 60
    assert learn([3] * 32).remaining(make_sequence(1, 0, score=True)) == 0
    assert learn([], context_length=20).remaining(make_sequence(1, 5)) == 13


def test_predictions_spread_over_the_conditional_distribution() -> None:
    forecast = learn([10] * 900 + [200] * 100)
    fresh = [forecast.remaining(make_sequence(number, 0, 1000)) for number in range(1000)]
    assert set(fresh) == {10, 200} and 95 <= fresh.count(200) <= 105
    assert {forecast.remaining(make_sequence(number, 10, 1000)) for number in range(100)} == {190}


def test_forecast_forgets_after_1000_lengths_and_learns_only_free_ones() -> None:
    forecast = learn([500] * 1000 + [4] * 1000)
    assert forecast.remaining(make_sequence(7, 0, 1000)) == 4
    for ignored in (make_sequence(0, 900, 1000, ignore_eos=True), make_sequence(0, 0, score=True)):
        forecast.record(ignored)
    for window in (forecast._all, *forecast._kinds.values()):
        assert window.ordered == [4] * 1000 == list(window.recent) and window.total == 4000


@pytest.mark.parametrize("max_tokens", [1, 30, 500])
def test_one_kind_is_predicted_as_all_kinds_are(max_tokens: int) -> None:
    draw = random.Random(max_tokens)
    forecast, everything = LengthForecast(), LengthWindow()
    for number in range(1500):
        sequence = make_sequence(number, draw.randrange(1, max_tokens + 1), max_tokens)
        forecast.record(sequence)
        everything.add(sequence.output_length)
        waiting = make_sequence(number, draw.randrange(max_tokens), max_tokens)
        lengths = sorted(length for length in everything.recent if length > waiting.output_length)
        most = max_tokens - waiting.output_length
        if number >= 31 and lengths:
            quantile = number * 2654435769 % 2**32
            most = min(most, lengths[quantile * len(lengths) // 2**32] - waiting.output_length)
        assert forecast.remaining(waiting) == most
    assert forecast._all == everything == forecast._kinds[max_tokens, None]


def test_kinds_learn_apart_and_borrow_from_all_until_they_know() -> None:
    forecast = learn([80] * 500, max_tokens=100)
    assert forecast.remaining(make_sequence(1, 0, 100, constraint=YES_NO)) == 80
    for _ in range(31):
        forecast.record(make_sequence(0, 2, 100, constraint=YES_NO))
    fresh = [forecast.remaining(make_sequence(number, 0, 100, constraint=YES_NO)) for number in range(200)]
    assert set(fresh) == {2, 80} and fresh.count(2) < 30
    forecast.record(make_sequence(0, 2, 100, constraint=YES_NO))
    same = Constraint("choice", '["yes", "no"]')
    assert {forecast.remaining(make_sequence(number, 0, 100, constraint=same)) for number in range(200)} == {2}
    assert {forecast.remaining(make_sequence(number, 0, 100)) for number in range(200)} == {80}
    other_max_tokens = {forecast.remaining(make_sequence(number, 0, 99)) for number in range(200)}
    assert other_max_tokens == {2, 80}
    assert forecast.remaining(make_sequence(1, 2, 100, constraint=YES_NO)) == 98


def test_kinds_are_bounded_and_the_one_that_learned_longest_ago_is_forgotten() -> None:
    forecast = learn([1] * 32, max_tokens=1000)
    for kind in range(MOST_KINDS - 1):
        forecast.record(make_sequence(0, 1 + kind, 100 + kind))
    forecast.record(make_sequence(0, 1, 1000))
    assert len(forecast._kinds) == MOST_KINDS
    before = list(forecast._kinds)
    assert forecast.remaining(make_sequence(1, 0, 100)) >= 1 and list(forecast._kinds) == before
    forecast.record(make_sequence(0, 50, 1, constraint=YES_NO))
    assert len(forecast._kinds) == MOST_KINDS
    assert (1000, None) in forecast._kinds and (1, YES_NO) in forecast._kinds and (100, None) not in forecast._kinds
    assert len(forecast._all) == 32 + MOST_KINDS + 1


def test_expected_length_is_the_mean_of_the_kind_else_of_all() -> None:
    def expected(lengths: Lengths, max_tokens: int, **other: bool) -> float:
        return lengths.expected(make_sequence(0, 0, max_tokens, **other).request)

    assert expected(learn([5] * 31, max_tokens=100), 100) == 100.0
    forecast = learn([10, 20] * 50, max_tokens=100)
    assert expected(forecast, 100) == expected(forecast, 200) == 15.0
    assert expected(forecast, 12) == 12.0
    assert expected(forecast, 100, ignore_eos=True) == 100.0 and expected(forecast, 100, score=True) == 0.0
    for _ in range(100):
        forecast.record(make_sequence(0, 190, 200))
    assert expected(forecast, 100) == 15.0 and expected(forecast, 200) == 190.0
    assert expected(forecast, 300) == 102.5
    assert expected(learn([900] * 1000 + [7] * 1000), 10_000) == 7.0
    for other in (AggressiveLengths(), ConservativeLengths(), OracleLengths({})):
        assert expected(other, 100) == 100.0 and expected(other, 100, score=True) == 0.0


VARIANTS: dict[str, Callable[[int | None], Lengths]] = {
    **ADMISSIONS,
    "learned": lambda context: learn([5, 30] * 40, context),
    "oracle": lambda context: OracleLengths(lambda number: 60),
    "oracle of a table": lambda context: OracleLengths({number: 60 for number in range(20)}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_keeps_to_the_protocol(name: str) -> None:
    """Whole numbers of at least 1, but 0 for scores; never above what is allowed; equal when asked again."""
    lengths = VARIANTS[name](80)
    for number in range(20):
        for generated in (0, 4, 59, 60, 77, 100):
            sequence = make_sequence(number, generated)
            answer = lengths.remaining(sequence)
            assert type(answer) is int and 1 <= answer <= max(1, min(100, 78) - generated)
            assert answer == lengths.remaining(sequence)
        assert lengths.remaining(make_sequence(number, 0, score=True)) == 0
    lengths.record(make_sequence(0, 9))
    lengths.record(make_sequence(0, 0, score=True))


def test_what_the_variants_answer() -> None:
    assert list(ADMISSIONS) == ["forecast", "aggressive", "conservative"]
    assert AggressiveLengths().remaining(make_sequence(0, 0)) == 1
    for _ in range(40):
        (conservative := ConservativeLengths()).record(make_sequence(0, 3))
    assert conservative.remaining(make_sequence(0, 30)) == 70
    assert ConservativeLengths(90).remaining(make_sequence(0, 30)) == 58
    assert OracleLengths({4: 33}).remaining(make_sequence(4, 30)) == 3
    with pytest.raises(KeyError):
        OracleLengths({4: 33}).remaining(make_sequence(5, 30))


def run_policies(seed: int, draw_length: Callable[[random.Random], int]) -> tuple[dict[str, int], dict[str, int]]:
    """Steps and preemptions by policy: 400 rows of at most 400 tokens in a pool of 4096."""
    steps, preempted = {}, {}
    for policy in (*ADMISSIONS, "oracle"):
        draw = random.Random(seed)
        driver = Driver(make_state([None], 256, 16, step_tokens=512, max_sequences=128))
        driver.state.lengths = ADMISSIONS[policy](None) if policy in ADMISSIONS else OracleLengths(driver.lengths)
        for _ in range(400):
            length = draw_length(draw)
            driver.add([draw.randrange(1 << 20) for _ in range(draw.randrange(10, 60))], length, max_tokens=400)
        steps[policy] = driver.run()
        preempted[policy] = sum(each.preemptions for each in driver.finished)
    assert preempted["conservative"] == preempted["oracle"] == 0
    return steps, preempted


@pytest.mark.parametrize("seed", range(3))
def test_looking_ahead_beats_reserving_the_most(seed: int) -> None:
    """Outputs far below `max_tokens`: reserving those would run few sequences at once."""
    steps, preempted = run_policies(seed, lambda draw: min(1 + int(draw.expovariate(1 / 60)), 400))
    assert preempted["forecast"] <= 0.15 * 400
    assert steps["conservative"] >= 1.3 * steps["forecast"], steps


@pytest.mark.parametrize("seed", range(3))
def test_looking_ahead_beats_hoping_for_the_best(seed: int) -> None:
    """Long outputs: admission by what is held now has each row preempted more than once."""
    steps, preempted = run_policies(seed, lambda draw: draw.randrange(100, 401))
    assert preempted["aggressive"] > 400 and preempted["forecast"] <= 0.1 * preempted["aggressive"], preempted
    assert steps["conservative"] >= 1.3 * steps["forecast"], steps


def test_a_fixed_budget_needs_no_reserve_for_lengths_that_are_not_known() -> None:
    """Rows of 2 known tokens, outputs of 500 ± 250 predicted, blocks of 16."""
    found = {}
    lengths = learn([250, 750] * 40)
    for name, shrink in (("none", None), ("budget", Shrink(48, 32)), ("share", Shrink(0.5, 32))):
        layout = replace(CacheLayout.from_windows([None] * 2, 16), shrink=shrink, shares_prefixes=shrink is None)
        outlook = Outlook(KVLedger(layout, 4000, prefix_cache=False), lengths, 512, [])
        for number in range(8):
            sequence = make_sequence(number, 0, 10_000)
            sequence.number = number
            outlook.add(sequence, Hit([]))
        demands = future_peak(outlook.demands.values())
        found[name] = (outlook.peak(), -(-demands // 16))
    # 48 tokens and 32 more are 5 blocks in each row.
    assert found["budget"] == (40, 40)
    assert all(reserved > alone for reserved, alone in (found["none"], found["share"]))
    assert found["share"][0] < found["none"][0]
