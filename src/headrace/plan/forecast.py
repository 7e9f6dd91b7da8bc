"""What a pile will take, before it runs: tokens, what sharing saves, memory, steps, seconds and their error bar.

Knows tasks and the scheduler; not files, not rows, not weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from zlib import crc32

from headrace.meter.step_time import StepTime, interpolate
from headrace.options import EngineOptions
from headrace.plan.reuse import count_distinct, count_least_recently_used
from headrace.plan.simulator import Memory, Simulated, Simulator, Task
from headrace.schedule.prefixes import pack

# A forecast is never called surer than this: machines differ from one minute to the next.
LEAST_ERROR = 0.10


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of a whole pile. Tokens count once a continuation; of what is refused none do.

    refused          of the requests, those that the engine refuses as too long
    prompt_tokens, output_tokens   what rows bring and what they are taken to generate (`outputs_known`: exactly)
    optimum_tokens   prompt tokens that must be computed if nothing computed were ever forgotten; all of them where the
                     settings share no prefixes
    arrival_tokens   those that a least-recently-used cache of the KV budget computes in the order of the file
    planned_tokens   those that the chosen schedule computes, whole blocks being shared
    windows          in which the schedule plans, one after the other; 0 for one that does not
    seconds          None where no step times were measured; error is the share by which they may be wrong
    simulated        the share of the work that was simulated; the rest is taken to go on alike
    """

    requests: int
    refused: int
    prompt_tokens: int
    output_tokens: int
    outputs_known: bool
    optimum_tokens: int
    arrival_tokens: int
    planned_tokens: int
    kv_peak_bytes: int
    kv_budget_bytes: int
    steps: int
    preemptions: int
    windows: int
    simulated: float
    seconds: float | None
    error: float | None
    energy_j: float | None
    timeline: list[tuple[float, float, int, int, int]] = field(repr=False)


def forecast(
    tasks: Sequence[Task],
    options: EngineOptions,
    memory: Memory,
    step_time: StepTime | None,
    outputs_known: bool = True,
    most_steps: int | None = None,
) -> Forecast:
    """Simulate the tasks, at most so many steps of them, and count what sharing saves."""
    requests = len(tasks)
    tasks = [task for task in tasks if not memory.refuses(task.request)]
    found = Simulator(options, memory, step_time).run(tasks, most_steps)
    share = measure_share(tasks, found, step_time)
    prompts = list(chain.from_iterable([task.request.prompt_token_ids] * task.request.params.n for task in tasks))
    outputs = sum(task.output * task.request.params.n for task in tasks if task.request.generates)
    total = sum(map(len, prompts))
    seconds = None if step_time is None else found.seconds / share
    planned = total - round(found.cached_prompt_tokens / share)
    shares = options.prefix_cache and memory.layout.shares_prefixes
    return Forecast(
        requests=requests,
        refused=requests - len(tasks),
        prompt_tokens=total,
        output_tokens=outputs,
        outputs_known=outputs_known,
        optimum_tokens=count_distinct(prompts) if shares else total,
        arrival_tokens=count_arrival(prompts, memory) if shares else total,
        planned_tokens=max(0, planned),
        kv_peak_bytes=found.peak_blocks * memory.layout.block_bytes,
        kv_budget_bytes=memory.num_blocks * memory.layout.block_bytes,
        steps=round(found.steps / share),
        preemptions=round(found.preemptions / share),
        windows=round(found.windows / share),
        simulated=round(share, 4),
        seconds=seconds,
        error=None if step_time is None else max(LEAST_ERROR, 2 * step_time.error),
        energy_j=None if step_time is None or step_time.watts is None else step_time.watts * (seconds or 0.0),
        timeline=found.timeline,
    )


def measure_share(tasks: Sequence[Task], found: Simulated, step_time: StepTime | None) -> float:
    """Which share of the work was simulated, in tokens by what they cost; 1 where nothing is left."""
    if not found.left:
        return 1.0
    prompt, output = 1.0, 1.0
    if step_time is not None:
        prompt = interpolate(step_time.tokens, 1024) / 1024
        output = (interpolate(step_time.tokens, 64) + interpolate(step_time.wanted, 64)) / 64
    work = sum(
        task.request.params.n * (len(task.request.prompt_token_ids) * prompt + task.output * output) for task in tasks
    )
    done = (found.cached_prompt_tokens + found.computed_prompt_tokens) * prompt + found.output_tokens * output
    return min(1.0, max(done, 1e-9) / work)


def count_arrival(prompts: Sequence[Sequence[int]], memory: Memory) -> int:
    """Prompt tokens computed in the order of arrival with a least-recently-used cache of the whole KV budget.

    Blocks are told apart by 31 bits of a checksum of their tokens, after equal blocks before them: of 100,000 different
    ones that follow the same block, two or three may be taken for others, which such a count can bear.
    """
    size = memory.layout.block_size
    blocks = []
    for prompt in map(pack, prompts):
        # The last token is always computed: without it there is nothing to choose the next one from.
        whole = range(0, (len(prompt) - 1) // size * size, size)
        blocks.append(pack(crc32(prompt[start : start + size]) & 0x7FFFFFFF for start in whole))
    found = sum(map(len, blocks)) - count_least_recently_used(blocks, memory.num_blocks // len(memory.layout.groups))
    return sum(map(len, prompts)) - found * size
