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
from dataclasses import replace
from pathlib import Path

from headrace.checkpoint import open_checkpoint
from headrace.core import Request, SamplingParams
from headrace.options import EngineOptions
from headrace.plan.simulator import Simulator, Task
from headrace.plan.site import open_site
from headrace.schedule.prefixes import grow_tree, order_rows


def make_packed(rows: int, tokens: int) -> list[bytes]:
    """Rows of three shared levels and a part of their own, shuffled."""
    draw = random.Random(0)

    def text(length: int) -> array[int]:
        return array("i", [draw.randrange(50_000) for _ in range(length)])

    roots = [text(tokens // 4) for _ in range(20)]
    branches = [root + text(tokens // 4) for root in roots for _ in range(25)]
    leaves = [branch + text(tokens // 4) for branch in branches for _ in range(4)]
    own = text(2 * tokens)
    found = []
    for place in range(rows):
        start = draw.randrange(tokens)
        found.append((leaves[place % len(leaves)] + own[start : start + tokens - 3 * (tokens // 4)]).tobytes())
    draw.shuffle(found)
    return found


def measure_order(rows: int, tokens: int) -> None:
    packed = make_packed(rows, tokens)
    held = peak_rss()
    began = time.perf_counter()
    root = grow_tree(packed, [1.0] * rows, 32)
    order = order_rows(root, 128)
    seconds = time.perf_counter() - began
    assert sorted(order) == list(range(rows))
    print(
        f"{rows:,} rows of {tokens:,} tokens: ordered in {seconds:.1f} s; {root.prefill / (rows * tokens):.1%} of "
        f"them to compute; {peak_rss() / 2**20:,.0f} MiB at most, {held / 2**20:,.0f} of them the rows themselves"
    )


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

    def make_tasks() -> list[Task]:
        draw, tasks = random.Random(0), []
        for place in range(rows):
            prompt, output = draw.choice(lengths)
            output = max(1, min(output, most // 2))
            # No two prompts share a token: the trace tells lengths, not texts.
            tokens = tuple(itertools.islice(numbers, min(prompt, most - output)))
            params = SamplingParams(max_tokens=output, ignore_eos=True)
            tasks.append(Task(Request(str(place), tokens, params), output))
        return tasks

    began = time.perf_counter()
    found = Simulator(replace(engine), site.memory, site.step_time).run(make_tasks())
    seconds = time.perf_counter() - began
    tokens = sum(point[2] + point[3] for point in found.timeline) / options.share * options.machines
    print(
        f"SIMULATED, not run: {options.rows:,} rows on {options.machines} machines: "
        f"{found.seconds / options.share / 3600:,.1f} h, {tokens / 1e9:.2f} G tokens computed; {rows:,} rows simulated "
        f"for each machine in {seconds:.1f} s, {found.steps:,} steps, {peak_rss() / 2**20:,.0f} MiB"
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
    azure.add_argument("--share", type=float, default=0.02)
    options = parser.parse_args()
    if options.kind == "rows":
        measure_order(options.rows, options.tokens)
    else:
        measure_azure(options)


if __name__ == "__main__":
    main()
