"""Forecast against measured time on ten piles, and the simulator's steps against the engine's, one by one.

    headrace bench steps --precision int8              once before
    python benchmarks/forecast.py --precision int8

Each pile is simulated first, then run on a fresh prefix cache; both see the same rows. Prints a Markdown table. Run it
with nothing else running.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from workloads import Row, make_rows

from headrace import LLM, SamplingParams
from headrace.core import Request
from headrace.meter.peaks import describe_machine
from headrace.meter.step_time import describe_setting, load_step_time
from headrace.plan.simulator import Memory, Simulated, Simulator, Task

PILES = ("prefill", "decode", "mixed", "prefix", "rag", "few-shot", "documents", "tree", "long", "tiny")


def make_pile(kind: str) -> list[Row]:
    draw = random.Random(5)
    if kind == "long":
        return [([draw.randrange(100, 49_000) for _ in range(3000)], 64) for _ in range(8)]
    if kind == "tiny":
        return [([draw.randrange(100, 49_000) for _ in range(draw.randrange(4, 24))], 12) for _ in range(400)]
    return make_rows(kind)


def simulate(llm: LLM, rows: list[Row], requests: list[Request]) -> Simulated:
    step_time = load_step_time(
        describe_setting(llm.model_hash, describe_machine(llm.resolved["instruction_set"]), llm.resolved)
    )
    if step_time is None:
        raise SystemExit("no step times for these settings: run `headrace bench steps` first")
    memory = Memory.of_engine(llm.engine)
    tasks = [Task(request, output) for request, (_, output) in zip(requests, rows, strict=True)]
    return Simulator(llm.options, memory, step_time).run(tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piles", nargs="*", default=PILES)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--schedule", default="planned")
    options = parser.parse_args()
    print(
        "| pile | rows | forecast | measured | error | steps | same steps |\n|---|---|---|---|---|---|---|", flush=True
    )
    errors = []
    for kind in options.piles:
        rows = make_pile(kind)
        params = [SamplingParams(max_tokens=output, ignore_eos=True) for _, output in rows]
        with LLM(options.model, precision=options.precision, schedule=options.schedule) as llm:
            requests = [Request(str(place), tuple(prompt), params[place]) for place, (prompt, _) in enumerate(rows)]
            found = simulate(llm, rows, requests)
            began = time.perf_counter()
            llm.generate([prompt for prompt, _ in rows], params, progress=False)
            seconds = time.perf_counter() - began
            steps = [tuple(point[2:]) for point in llm.engine.meter.timeline]
        same = [tuple(map(float, point[2:])) for point in found.timeline] == [tuple(map(float, each)) for each in steps]
        errors.append(found.seconds / seconds - 1)
        print(
            f"| {kind} | {len(rows)} | {found.seconds:.2f} s | {seconds:.2f} s | {errors[-1]:+.1%} | {found.steps:,} | "
            f"{'yes' if same else 'no'} |",
            flush=True,
        )
    print(f"\nmedian error {statistics.median(map(abs, errors)):.1%}, largest {max(map(abs, errors)):.1%}")


if __name__ == "__main__":
    main()
