"""Piles that share prefixes: the plan computes what must be computed, and answers are those of any other order."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
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
# The real model's blocks in a GiB of KV memory: those in all, and those that may be held by nobody.
BLOCKS, RETAINED = 1456, 364
KINDS = ("prefix", "few-shot", "documents", "tree")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load_benchmark(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def make_rows() -> Any:
    return load_benchmark("workloads").make_rows


@pytest.fixture(scope="module")
def sharing() -> ModuleType:
    return load_benchmark("sharing")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_computed_is_what_must_be_in_whole_blocks(kind: str, make_rows: Any) -> None:
    rows = make_rows(kind)
    must = grow_tree([pack(prompt) for prompt, _ in rows], [1.0] * len(rows), BLOCK).prefill
    layout = make_state([None], 1, BLOCK).ledger.layout
    tasks = [
        Task(Request(str(place), prompt, SamplingParams(max_tokens=output, ignore_eos=True)), output)
        for place, (prompt, output) in enumerate(rows)
    ]
    retained = RETAINED * layout.block_bytes
    computed = {}
    for schedule in ("planned", "random"):
        options = EngineOptions(schedule=schedule, block_size=BLOCK, prefix_retain_bytes=retained)
        found = Simulator(options, Memory(layout, BLOCKS, 8192), None).run(tasks)
        assert found.tasks == len(rows)
        computed[schedule] = found.computed_prompt_tokens
    assert computed["planned"] == must <= computed["random"]


@pytest.mark.parametrize(("variant", "most"), [("planned", [1.22, 1.01, 1.45, 1.51]), ("one at a time", [1.0] * 4)])
def test_memory_over_one_prefix_and_what_runs(variant: str, most: list[float], make_rows: Any, sharing: Any) -> None:
    """At the peak, as benchmarks/results/sharing.md has it: what more is held are prefixes of other open groups."""
    layout = make_state([None], 1, BLOCK).ledger.layout
    options = EngineOptions(block_size=BLOCK, prefix_retain_bytes=RETAINED * layout.block_bytes)
    for kind, bound in zip(KINDS, most, strict=True):
        rows = make_rows(kind)
        use, found = sharing.simulate(rows, options, Memory(layout, BLOCKS, 8192), None, variant)
        assert use.at_peak <= bound and use.peak == found.peak_blocks, kind
        assert found.tasks == len(rows), kind
        assert (use.groups == 1) == (bound < 1.1), kind


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same_in_every_schedule(kind: str, tiny_model: Path, make_rows: Any) -> None:
    """Of 96 rows, cut at the front, so that they share prefixes still."""
    rows = make_rows(kind, vocabulary=300)[:96]
    cut = min(len(prompt) for prompt, _ in rows) - 300
    prompts = [prompt[cut:] for prompt, _ in rows]
    params = [SamplingParams(max_tokens=min(8, output), logprobs=2) for _, output in rows]
    answers = {}
    for schedule in SCHEDULES:
        options = engine_options(tiny_model, schedule=schedule, step_tokens=128, max_sequences=12)
        with LLM(**asdict(options)) as llm:
            outputs = llm.generate(prompts, params)
            assert llm.engine.counters.cached_prompt_tokens > 0
        answers[schedule] = [(each.outputs[0].token_ids, each.outputs[0].logprobs) for each in outputs]
    assert all(each == answers["planned"] for each in answers.values())
