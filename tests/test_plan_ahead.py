"""The next step planned while one is computed: the steps, and so the answers, are those of an engine that waits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import answers, make_prompts, mixed_params, open_model, windowed_model

from headrace import LLM, SamplingParams
from headrace.cache.checks import check_ledger
from headrace.cache.tier import Tier
from headrace.core import Request, StepPlan
from headrace.engine.planner import Planner
from headrace.kernels.base import RaggedBatch
from headrace.meter.stopwatch import Stopwatch
from headrace.schedule.choice import SCHEDULES
from headrace.schedule.state import SchedulerState
from headrace.schedule.step import plan_step

__all__ = ["windowed_model"]

BLOCK = 2 * 2 * 2 * 16 * 16 * 4


class Recorder(Planner):
    """Notes every plan, and how many were made ahead."""

    def __init__(self, schedule: str, ahead: bool) -> None:
        super().__init__(SCHEDULES[schedule](), ahead)
        self.plans: list[StepPlan] = []
        self.used = 0

    def plan(self, state: SchedulerState, tier: Tier | None, watch: Stopwatch) -> StepPlan:
        known = self._next
        plan = super().plan(state, tier, watch)
        if known is not None and plan is known[0]:
            self.used += 1
            assert plan == plan_step(state, state.limits)
        self.plans.append(plan)
        return plan


def record(llm: LLM, ahead: bool, schedule: str = "planned") -> Recorder:
    llm.engine.planner.close()
    llm.engine.planner = recorder = Recorder(schedule, ahead)
    return recorder


@pytest.mark.parametrize("schedule", ["planned", "fcfs", "shortest", "random", "interactive"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("tiny_model", {}),
        ("tiny_model", {"kv_cache_bytes": 12 * BLOCK, "max_sequences": 24}),
        ("tiny_model", {"step_tokens": 33}),
        ("tiny_model", {"kv": "streaming(keep=0.25, every=32)"}),
        ("windowed_model", {}),
    ],
)
def test_steps_and_answers_are_those_planned_afterwards(
    schedule: str, family: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    folder, prompts, params = request.getfixturevalue(family), make_prompts(24), mixed_params(24)
    with open_model(folder, plan_ahead="off", schedule=schedule, **options) as waiting:
        afterwards = record(waiting, ahead=False, schedule=schedule)
        expected = answers(waiting.generate(prompts, params))
    with open_model(folder, plan_ahead="on", schedule=schedule, **options) as overlapping:
        planner = record(overlapping, ahead=True, schedule=schedule)
        assert answers(overlapping.generate(prompts, params)) == expected
        check_ledger(overlapping.engine.state.ledger, [])
    assert planner.plans == afterwards.plans
    assert planner.used > 0 and afterwards.used == 0


def test_who_comes_or_goes_between_steps_is_planned_for(tiny_model: Path) -> None:
    """What was planned ahead knows nothing of them."""
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with open_model(tiny_model) as llm:
        engine, planner = llm.engine, record(llm, ahead=True)
        for number, prompt in enumerate(make_prompts(6)):
            engine.add(Request(str(number), tuple(prompt), params))
            engine.step()
            engine.step()
            used = planner.used
            if number == 3:
                engine.abort("1")
                engine.step()
                assert planner.used == used
        for _ in range(5):
            engine.step()
        assert planner.used >= 5
        engine.abort_all([str(number) for number in range(6)])
        check_ledger(engine.state.ledger, [])
        assert engine.step() == []


def test_prefixes_that_nobody_keeps_any_more_are_not_planned_with(tiny_model: Path) -> None:
    """A program's next turn lets go of what was kept for it: a row that waits may have been promised that."""
    old, other, row = (
        [first + place % 90 for place in range(length)] for first, length in ((5, 64), (105, 48), (5, 80))
    )
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    found = []
    for ahead in (False, True):
        with open_model(tiny_model, prefix_retain_bytes=0, step_tokens=32, schedule="fcfs") as llm:
            engine = llm.engine
            record(llm, ahead, "fcfs")
            engine.keep = lambda sequence: 1000.0
            for name, prompts, program in (("first", [old], "p"), ("next", [other, row, *make_prompts(4)], "p")):
                for number, prompt in enumerate(prompts):
                    engine.add(Request(f"{name} {number}", tuple(prompt), params, program="" if number else program))
                while engine.unfinished:
                    found += [(each.request_id, each.outputs[0].token_ids) for each in engine.step()]
            check_ledger(engine.state.ledger, [])
    assert len(found) == 14 and found[:7] == found[7:]


class Fault(Exception):
    """What happens to a step."""


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("family", ["tiny_model", "windowed_model"])
def test_a_step_that_fails_leaves_nothing_of_itself(
    ahead: bool, family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows go on from what is known to be computed, and no prefix is found that was not."""
    folder, prompts = request.getfixturevalue(family), make_prompts(12)
    params = SamplingParams(max_tokens=30)
    with open_model(folder) as llm:
        expected = {each.request_id: each.outputs[0].token_ids for each in llm.generate(prompts, params)}
    with open_model(folder) as llm:
        engine, forward, steps = llm.engine, llm.engine.model.forward, iter(range(1000))

        def fail_sometimes(batch: RaggedBatch, cache: Any) -> Any:
            if next(steps) % 5 == 3:
                # The keys and values that it has written are not those that were asked for.
                forward(replace(batch, token_ids=torch.zeros_like(batch.token_ids)), cache)
                raise Fault
            return forward(batch, cache)

        record(llm, ahead)
        monkeypatch.setattr(engine.model, "forward", fail_sometimes)
        for number, prompt in enumerate(prompts):
            engine.add(Request(str(number), tuple(prompt), params))
        found = {}
        while engine.unfinished:
            try:
                found |= {each.request_id: each.outputs[0].token_ids for each in engine.step()}
            except Fault:
                check_ledger(engine.state.ledger, engine.state.running)
    assert list(found.values()) and found == expected
