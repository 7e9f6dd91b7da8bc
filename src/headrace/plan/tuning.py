"""Find the settings that run fastest here: many by simulation, the best of them by short runs, in turn.

After the irregular landscapes that hyperparameters of inference have (arXiv 2408.01050): no hill is climbed, and what a
simulation likes is believed only when the engine shows it. Only settings that change no result are searched.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from headrace.checkpoint import Checkpoint
from headrace.core import InputError, Request, SamplingParams
from headrace.llm import LLM
from headrace.meter.peaks import count_cores
from headrace.meter.step_time import spell_command
from headrace.options import EngineOptions
from headrace.plan.simulator import Simulator, Task
from headrace.plan.site import open_site

STEP_TOKENS, MAX_SEQUENCES, BLOCK_SIZES = (256, 512, 1024, 2048), (64, 128, 256, 512), (16, 32, 64)
FINALISTS, ROUNDS = 3, 3
# Less than this may be chance.
LEAST_GAIN = 0.03

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Trial:
    """Settings that differ from the defaults, and the median seconds of a short pile under them."""

    changes: dict[str, int]
    seconds: float


@dataclass(frozen=True, slots=True)
class Tuning:
    """Trials, the first being the defaults, and the changes to keep: none where nothing was clearly faster."""

    trials: list[Trial]
    kept: dict[str, int]


def tune(options: EngineOptions, checkpoint: Checkpoint, tell: Tell) -> Tuning:
    """Search. Raises InputError where no step times were measured for these settings."""
    options = replace(options, tuned=False)
    finalists = rank_simulated(options, checkpoint, tell)
    trials = run_trials(options, [{}, *finalists], tell)
    best = min(trials, key=lambda trial: trial.seconds)
    # What no simulation knows, from the best of those on.
    sizes = [{"block_size": size} for size in BLOCK_SIZES if size != options.block_size]
    counts = sorted({count_cores() // 2, 3 * count_cores() // 4} - {0, count_cores()})
    fewer = [{"threads": count} for count in counts]
    trials += run_trials(options, [best.changes | change for change in (*sizes, *fewer)], tell)
    best = min(trials, key=lambda trial: trial.seconds)
    return Tuning(trials, best.changes if best.seconds < (1 - LEAST_GAIN) * trials[0].seconds else {})


def rank_simulated(options: EngineOptions, checkpoint: Checkpoint, tell: Tell) -> list[dict[str, int]]:
    """The settings of a step that a simulated pile likes best."""
    site = open_site(options, checkpoint)
    if site.step_time is None:
        raise InputError(f"tuning begins with simulations: measure what steps take first: `{spell_command(options)}`")
    tasks, found = list(make_workload(512, site.memory.context_length)), []
    for step_tokens, most in product(STEP_TOKENS, MAX_SEQUENCES):
        tell(f"simulating {step_tokens} tokens a step, {most} sequences")
        changes = {"step_tokens": step_tokens, "max_sequences": most}
        seconds = Simulator(replace(options, **changes), site.memory, site.step_time).run(tasks).seconds  # type: ignore[arg-type]
        found.append((seconds, changes))
    found.sort(key=lambda each: each[0])
    return [changes for _, changes in found[:FINALISTS]]


def run_trials(options: EngineOptions, settings: Sequence[dict[str, int]], tell: Tell) -> list[Trial]:
    """Median seconds of a short pile under each setting, in turn, so that a slow moment meets all of them."""
    seconds: list[list[float]] = [[] for _ in settings]
    for turn in range(ROUNDS):
        for place, changes in enumerate(settings):
            tell(f"{describe_changes(changes)}, round {turn + 1} of {ROUNDS}")
            seconds[place].append(run_pile(asdict(options) | changes))
    return [Trial(changes, statistics.median(each)) for changes, each in zip(settings, seconds, strict=True)]


def run_pile(settings: dict[str, Any]) -> float:
    with LLM(**settings) as llm:
        tasks = list(make_workload(128, llm.context_length))
        prompts, params = [task.request.prompt_token_ids for task in tasks], [task.request.params for task in tasks]
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
        began = time.perf_counter()
        llm.generate(prompts, params, progress=False)
        return time.perf_counter() - began


def make_workload(count: int, context_length: int) -> Iterator[Task]:
    """Rows as piles have them: some share an instruction, most are short, outputs are shorter."""
    draw, most = random.Random(0), context_length // 4
    roots = [[draw.randrange(3, 1000) for _ in range(min(96, most))] for _ in range(4)]
    for number in range(count):
        own = [draw.randrange(3, 1000) for _ in range(draw.randrange(8, min(192, most)))]
        output = draw.randrange(4, min(48, most))
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        yield Task(Request(str(number), tuple(draw.choice(roots) + own), params), output)


def describe_changes(changes: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in changes.items()) or "the defaults"
