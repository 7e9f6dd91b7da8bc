"""Piles that share prefixes: the plan computes what must be computed, and answers are those of any other order."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from jobs import engine_options
from schedule_driver import make_state

from headrace import LLM, SamplingParams
from headrace.core import Request
from headrace.options import EngineOptions
from headrace.plan.simulator import Memory, Simulator, Task
from headrace.schedule.choice import SCHEDULES
from headrace.schedule.prefixes import grow_tree, pack

BLOCK = 32
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def make_rows() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("workloads").make_rows


@pytest.mark.parametrize("kind", ["prefix", "few-shot", "documents", "tree"])
def test_what_is_computed_is_what_must_be_in_whole_blocks(kind: str, make_rows: Any) -> None:
    rows = make_rows(kind)
    must = grow_tree([pack(prompt) for prompt, _ in rows], [1.0] * len(rows), BLOCK).prefill
    layout = make_state([None], 1, BLOCK).ledger.layout
    tasks = [
        Task(Request(str(place), prompt, SamplingParams(max_tokens=output, ignore_eos=True)), output)
        for place, (prompt, output) in enumerate(rows)
    ]
    # As the real model in a GiB of KV memory: blocks in all, and such as may be held by nobody.
    retained, blocks = 364 * layout.block_bytes, 1456
    computed = {}
    for schedule in ("planned", "random"):
        options = EngineOptions(schedule=schedule, block_size=BLOCK, prefix_retain_bytes=retained)
        found = Simulator(options, Memory(layout, blocks, 8192), None).run(tasks)
        assert found.tasks == len(rows)
        computed[schedule] = found.computed_prompt_tokens
    assert computed["planned"] == must <= computed["random"]


def test_answers_are_the_same_in_every_schedule(tiny_model: Path, make_rows: Any) -> None:
    rows = [(prompt[-300:], output) for prompt, output in make_rows("tree", vocabulary=300)]
    params = [SamplingParams(max_tokens=min(8, output), logprobs=2) for _, output in rows]
    answers = {}
    for schedule in SCHEDULES:
        options = engine_options(tiny_model, schedule=schedule, step_tokens=128, max_sequences=12)
        with LLM(**asdict(options)) as llm:
            outputs = llm.generate([prompt for prompt, _ in rows], params)
        answers[schedule] = [(each.outputs[0].token_ids, each.outputs[0].logprobs) for each in outputs]
    assert all(each == answers["planned"] for each in answers.values())
