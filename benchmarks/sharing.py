"""How much KV memory piles that share prefixes hold at once, simulated: as planned, and with fewer groups open.

    headrace bench steps --precision int8              once before
    python benchmarks/sharing.py

A group is the rows of one longest shared prefix. In every step the blocks in use are divided by the least that could
be: those of one shared prefix, the longest in use, and those that each running row holds behind its own. Variants:

  planned          as `headrace run` does it
  group's size     no more sequences at once than the largest group has rows
  none waits       a group is opened when no row of the one before waits any more
  one at a time    a group is opened when the one before has ended

Columns: the largest such ratio of any step, that of the step with most blocks in use, these blocks, the most groups
open at once, steps, seconds, prompt tokens computed. Nothing is run: seconds are those of `headrace bench steps`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from workloads import SHARING, Row, make_rows

from headrace.checkpoint import open_checkpoint
from headrace.core import Request, SamplingParams, StepPlan
from headrace.meter.step_time import StepTime
from headrace.options import EngineOptions
from headrace.plan.simulator import Memory, Simulated, Simulator, Task
from headrace.plan.site import open_site
from headrace.schedule.prefixes import Branch, count_common, grow_tree, order_rows, pack

KINDS = ("prefix", *SHARING)
VARIANTS = ("planned", "group's size", "none waits", "one at a time")
COLUMNS = ("workload", "variant", "largest", "at the peak", "blocks", "groups", "steps", "seconds", "prompt tokens")


@dataclass(slots=True)
class Use:
    """Blocks in use over the least that could be: the largest of any step, and that of the step that used most.

    `peak` are the blocks of that step, `groups` the most that were open at once.
    """

    largest: float = 0.0
    at_peak: float = 0.0
    peak: int = 0
    groups: int = 0

    def count(self, used: int, least: int, groups: int) -> None:
        self.largest = max(self.largest, used / least)
        self.groups = max(self.groups, groups)
        if used > self.peak:
            self.peak, self.at_peak = used, used / least


def list_groups(rows: list[Row], unit: int) -> list[tuple[int, list[int]]]:
    """The shared prefix of each group, in whole `unit`s of tokens, and its rows, in the order of the plan."""
    tree = grow_tree([pack(prompt) for prompt, _ in rows], [float(output) for _, output in rows], unit)
    order, prefixes = order_rows(tree), dict(list_prefixes(tree))
    groups = [(prefixes[order[0]], [order[0]])]
    for before, row in pairwise(order):
        prefix = prefixes[row]
        if prefix == prefixes[before] and count_common(rows[before][0], rows[row][0]) >= prefix:
            groups[-1][1].append(row)
        else:
            groups.append((prefix, [row]))
    return groups


def list_prefixes(branch: Branch) -> Iterator[tuple[int, int]]:
    """Each row and how many tokens it shares with some other row."""
    for each in branch.branches:
        if each.row >= 0:
            yield each.row, branch.depth
        yield from list_prefixes(each)


def simulate(
    rows: list[Row], options: EngineOptions, memory: Memory, step_time: StepTime | None, variant: str = "planned"
) -> tuple[Use, Simulated]:
    size, use = options.block_size, Use()
    groups = list_groups(rows, size)
    # Of each row, its group and how many blocks it shares with the rest of that.
    shared = {row: (group, prefix // size) for group, (prefix, members) in enumerate(groups) for row in members}
    if variant == "group's size":
        options = replace(options, max_sequences=max(len(members) for _, members in groups))

    def watch(plan: StepPlan) -> None:
        running = simulator.state.running
        held = [(len(each.tables[0]), *shared[int(each.request.id)]) for each in running]
        path = max(min(blocks, prefix) for blocks, _, prefix in held)
        own = sum(max(0, blocks - prefix) for blocks, _, prefix in held)
        use.count(simulator.state.ledger.used_blocks, path + own, len({group for _, group, _ in held}))

    simulator = Simulator(options, memory, step_time, watch)
    tasks = [make_task(place, *row) for place, row in enumerate(rows)]
    if variant in ("none waits", "one at a time"):
        for _, members in groups:
            open_group(simulator, [tasks[place] for place in members], variant == "none waits")
        tasks = []
    if tasks or simulator.state.sequences:
        simulator.run(tasks)
    return use, simulator.found


def make_task(place: int, prompt: list[int], output: int) -> Task:
    return Task(Request(str(place), tuple(prompt), SamplingParams(max_tokens=output, ignore_eos=True)), output)


def open_group(simulator: Simulator, tasks: list[Task], until_admitted: bool) -> None:
    """Simulate until these tasks have ended, or (`until_admitted`) until none of them waits."""
    if not until_admitted:
        simulator.run(tasks)
        return
    simulator.run(tasks, simulator.found.steps + 1)
    while simulator.state.waiting:
        simulator.run([], simulator.found.steps + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", default="int8")
    arguments = parser.parse_args()
    options = EngineOptions(model=arguments.model, precision=arguments.precision)
    site = open_site(options, open_checkpoint(options.model))
    if site.step_time is None:
        raise SystemExit("no step times for these settings: run `headrace bench steps` first")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for kind in arguments.kinds:
        rows = make_rows(kind)
        for variant in VARIANTS:
            use, found = simulate(rows, site.options, site.memory, site.step_time, variant)
            ratios = f"{use.largest:.2f} | {use.at_peak:.2f} | {use.peak:,} | {use.groups}"
            work = f"{found.steps:,} | {found.seconds:.1f} s | {found.computed_prompt_tokens:,}"
            print(f"| {kind} | {variant} | {ratios} | {work} |", flush=True)


if __name__ == "__main__":
    main()
