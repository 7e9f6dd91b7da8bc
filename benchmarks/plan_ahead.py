"""What planning a step beside the one before it is worth, with all cores at work and with one left over.

    python benchmarks/plan_ahead.py [--rows 128] [--prompt 100] [--output 60] [--threads 1,2] [--repeat 5]

Random prompts, each answered by half as many to half as many again tokens as `--output` says, in turn with steps
planned afterwards and ahead, by one engine. Prints a Markdown table: medians, and the median of each pair's ratio.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator

from headrace import LLM, SamplingParams
from headrace.engine.planner import Planner
from headrace.meter.peaks import count_cores
from headrace.options import DEFAULT_MODEL


def measure(llm: LLM, ahead: bool, prompts: list[list[int]], params: list[SamplingParams]) -> tuple[float, float, int]:
    """Seconds of all rows, those of them between two steps' arithmetic, and steps."""
    engine = llm.engine
    before = engine.planner
    engine.planner = Planner(before.schedule, ahead)
    steps, watch = engine.counters.steps, dict(engine.meter.watch.seconds)
    began = time.perf_counter()
    llm.generate(prompts, params, progress=False)
    seconds = time.perf_counter() - began
    between = engine.meter.watch.seconds["scheduling"] - watch.get("scheduling", 0.0)
    engine.planner.close()
    engine.planner = before
    return seconds, between, engine.counters.steps - steps


def compare(arguments: argparse.Namespace, threads: int) -> Iterator[str]:
    source = random.Random(0)
    prompts = [[source.randrange(100, 49_000) for _ in range(arguments.prompt)] for _ in range(arguments.rows)]
    lengths = [source.randint(arguments.output // 2, arguments.output * 3 // 2) for _ in prompts]
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
    options = {"precision": arguments.precision, "threads": threads, "kv_cache_bytes": 2 << 30, "prefix_cache": False}
    found: dict[bool, list[tuple[float, float, int]]] = {False: [], True: []}
    with LLM(arguments.model, **options) as llm:
        measure(llm, True, prompts[:8], params[:8])
        for _ in range(arguments.repeat):
            for ahead, runs in found.items():
                runs.append(measure(llm, ahead, prompts, params))
    ratios = [one[0] / other[0] for one, other in zip(found[False], found[True], strict=True)]
    for ahead, runs in found.items():
        seconds, between, steps = (statistics.median(each) for each in zip(*runs, strict=True))
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})" if ahead else ""
        yield (
            f"| {threads} of {count_cores()} | {'ahead' if ahead else 'afterwards'} | {seconds:.2f} | "
            f"{between / seconds:.2%} | {steps:.0f} | {ratio} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--threads", default=f"1,{count_cores()}", help="numbers of threads, with commas between")
    for name, most in (("rows", 128), ("prompt", 100), ("output", 60), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=most)
    arguments = parser.parse_args()
    print("| threads | planned | seconds | scheduling | steps | times as fast |\n|---|---|---|---|---|---|")
    for threads in map(int, arguments.threads.split(",")):
        for line in compare(arguments, threads):
            print(line, flush=True)


if __name__ == "__main__":
    main()
