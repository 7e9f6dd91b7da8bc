"""What planning costs: 100,000 rows of 1,000 tokens ordered, and a pile of production lengths simulated.

    python benchmarks/planning.py rows [--rows 100000] [--tokens 1000]
    python benchmarks/planning.py azure azure_conv_2023.csv --rows 1000000 --machines 8 [--share 0.02]

The second is a simulation on a clock: prompts and outputs have the trace's lengths, nothing is computed, and seconds
are those of `headrace bench steps`. `--share` simulates a part of the rows and takes the rest to go on alike.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import resource
import time
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from headrace.checkpoint import open_checkpoint
from headrace.core import Request, SamplingParams, Sequence
from headrace.options import EngineOptions
from headrace.plan.forecast import LEAST_ERROR
from headrace.plan.reuse import count_distinct
from headrace.plan.simulator import Simulator, Task
from headrace.plan.site import open_site
from headrace.schedule.apply import arrange
from headrace.schedule.choice import SCHEDULES
from headrace.schedule.prefixes import count_common
from headrace.schedule.state import SchedulerState
from headrace.schedule.window import Held, Window


def make_pile(rows: int, tokens: int) -> Iterator[array[int]]:
    """Rows of three shared levels and a part of their own, shuffled."""
    draw = random.Random(0)

    def text(length: int) -> array[int]:
        return array("i", [draw.randrange(50_000) for _ in range(length)])

    roots = [text(tokens // 4) for _ in range(20)]
    branches = [root + text(tokens // 4) for root in roots for _ in range(25)]
    leaves = [branch + text(tokens // 4) for branch in branches for _ in range(4)]
    own = text(2 * tokens)
    places = list(range(rows))
    draw.shuffle(places)
    for place in places:
        start = draw.randrange(tokens)
        yield leaves[place % len(leaves)] + own[start : start + tokens - 3 * (tokens // 4)]


def measure_order(rows: int, tokens: int) -> None:
    """Queue requests as an engine does, until the window is full, and have them arranged."""
    engine, begun = EngineOptions(), peak_rss()
    site = open_site(engine, open_checkpoint(engine.model))
    state = SchedulerState.create(site.memory.layout, site.memory.num_blocks, engine)
    schedule = SCHEDULES[engine.schedule]()
    window, held = Window(state, schedule), Held()
    params = SamplingParams(max_tokens=64)
    for number, prompt in enumerate(make_pile(rows, tokens)):
        if not window.wants(held.bytes):
            raise SystemExit(f"{number:,} rows fill a window of {engine.window_bytes:,} bytes")
        request = Request(str(number), prompt, params)
        held.take(request)
        state.add(Sequence(request, 0, number, request.prompt_token_ids))
    waiting, began = peak_rss(), time.perf_counter()
    arrange(schedule, state)
    seconds = time.perf_counter() - began
    order = [sequence.tokens for sequence in state.waiting]
    print(
        f"{rows:,} rows of {tokens:,} tokens in one window: ordered in {seconds:.1f} s; "
        f"{(waiting - begun) / 2**20:,.0f} MiB for the rows, {(peak_rss() - waiting) / 2**20:,.0f} more to order them"
    )
    total = rows * tokens
    computed = total - sum(count_common(one, other) for one, other in itertools.pairwise(order))
    print(f"{computed / total:.1%} of the tokens to compute, at best {count_distinct(order) / total:.1%}")


def measure_azure(options: argparse.Namespace) -> None:
    with Path(options.trace).open() as file:
        lengths = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    engine = EngineOptions(model=options.model, precision=options.precision)
    site = open_site(engine, open_checkpoint(engine.model))
    if site.step_time is None:
        raise SystemExit("no step times for these settings: run `headrace bench steps` first")
    most = site.memory.context_length
    rows = max(1, round(options.rows / options.machines * options.share))
    numbers = itertools.count(-1, -1)

    def make_tasks() -> Iterator[Task]:
        draw = random.Random(0)
        for place in range(rows):
            prompt, output = draw.choice(lengths)
            output = max(1, min(output, most // 2))
            # No two prompts share a token: the trace tells lengths, not texts.
            tokens = array("i", itertools.islice(numbers, min(prompt, most - output)))
            params = SamplingParams(max_tokens=output, ignore_eos=True)
            yield Task(Request(str(place), tokens, params), output)

    began = time.perf_counter()
    found = Simulator(replace(engine), site.memory, site.step_time).run(make_tasks())
    seconds = time.perf_counter() - began
    tokens = sum(point[2] + point[3] for point in found.timeline) / options.share * options.machines
    print(
        f"SIMULATED, not run: {options.rows:,} rows on {options.machines} machines: "
        f"{found.seconds / options.share / 3600:,.1f} h, {tokens / 1e9:.2f} G tokens computed; {rows:,} rows simulated "
        f"for each machine in {seconds:.1f} s, {found.steps:,} steps, {found.windows} windows, "
        f"{peak_rss() / 2**20:,.0f} MiB; error bar {2 * site.step_time.error:.0%} and at least {LEAST_ERROR:.0%}"
    )


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    order = kinds.add_parser("rows")
    order.add_argument("--rows", type=int, default=100_000)
    order.add_argument("--tokens", type=int, default=1000)
    azure = kinds.add_parser("azure")
    azure.add_argument("trace")
    azure.add_argument("--model", default="smollm2-135m")
    azure.add_argument("--precision", default="int8")
    azure.add_argument("--rows", type=int, default=1_000_000)
    azure.add_argument("--machines", type=int, default=1)
    azure.add_argument("--share", type=float, default=1.0)
    options = parser.parse_args()
    if options.kind == "rows":
        measure_order(options.rows, options.tokens)
    else:
        measure_azure(options)


if __name__ == "__main__":
    main()
