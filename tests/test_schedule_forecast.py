"""The past (length forecast) and the future (peak memory), against brute force."""

from __future__ import annotations

import random

import pytest
from schedule_driver import Driver, make_state

from headrace.core import Request, SamplingParams, Sequence
from headrace.schedule.forecast import Demand, LengthForecast, future_peak


def make_sequence(
    number: int, generated: int, max_tokens: int = 100, ignore_eos: bool = False, score: bool = False
) -> Sequence:
    request = Request("r", (1, 2), SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos), score)
    return Sequence(request, 0, number, [1, 2, *range(generated)])


def learn(lengths: list[int], context_length: int | None = None) -> LengthForecast:
    forecast = LengthForecast(context_length)
    for length in lengths:
        forecast.record(make_sequence(0, length, 10_000))
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
    assert forecast._ordered == [4] * 1000 == list(forecast._recent)


@pytest.mark.parametrize("seed", range(3))
def test_looking_ahead_beats_reserving_the_most(seed: int) -> None:
    """A pool that max_tokens would fill with few sequences: the forecast packs it, with few preemptions."""
    steps, preempted = {}, {}
    for policy in ("forecast", "reserve"):
        draw = random.Random(seed)
        driver = Driver(make_state([None], 256, 16, step_tokens=512, max_sequences=128))
        if policy == "reserve":
            driver.state.forecast.record = lambda sequence: None  # type: ignore[method-assign]
        for _ in range(400):
            length = min(1 + int(draw.expovariate(1 / 60)), 400)
            driver.add([draw.randrange(1 << 20) for _ in range(draw.randrange(10, 60))], length, max_tokens=400)
        steps[policy] = driver.run()
        preempted[policy] = sum(each.preemptions for each in driver.finished)
    assert preempted["reserve"] == 0 and preempted["forecast"] <= 0.15 * 400
    assert steps["reserve"] >= 1.3 * steps["forecast"], (steps, preempted)
