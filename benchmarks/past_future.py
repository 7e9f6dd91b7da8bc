"""Which admission runs a pile in the fewest steps? The Past-Future scheduler's simulation, with Headrace's forecasts.

    python benchmarks/past_future.py [--seeds 2]

After arXiv 2507.10150 and the CPU simulation of its artifact (github.com/WuSiYu/lightllm-ae, behavior-analysis):

- 120,000 tokens of KV memory, a queue of requests of uniformly random input and output lengths that never runs dry.
- In a step every running request grows by a token, and leaves when it has its output. If memory is passed then, the
  newest are evicted to the front of the queue. They keep their tokens, and computing them again takes no step.
- After every tenth step requests enter in order, until one does not fit or 32,768 prompt tokens have entered.
- It ends when the queue is empty. Memory use is the mean over all steps (before evictions) and admissions.

Policies as the artifact has them:

- aggressive: what is held and the new prompt fill at most 99 %. Of an evicted request only the prompt is asked for.
- conservative: the sum of prompt + 4096 is at most 100 %. (Outputs in D2 reach 5000 all the same.)
- past-future: future peak below 97 % for each of at most 5 sets of random lengths. Of what runs they are drawn from
  those above what is generated among the last 1000 (at first 500 of 512), interpolated; of what would enter, from all.
- oracle: future peak with the true lengths at most 100 %.

Headrace's own, where requests say a `max_tokens` that is never passed (4096, in D2 5000):

- forecast: `LengthForecast`, which knows nothing at first, and future peak at most 97 % or 100 %.
- as shipped: the same, and in place of 3 % one standard deviation of the sum of the lengths (`Outlook.peak`).
- conservative by peak: `ConservativeLengths` and future peak: the oldest end before the newest are long.

The artifact's programs, run once, gave the numbers beside ours. They are unseeded; ours are means over the seeds.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np

from headrace.core import Request, SamplingParams, Sequence
from headrace.schedule.forecast import Demand, future_peak
from headrace.schedule.lengths import AggressiveLengths, ConservativeLengths, LengthForecast, Lengths, OracleLengths

CAPACITY = 120_000
ADMISSION_INTERVAL = 10
ADMITTED_TOKENS = 32_768
MAX_TOKENS = 4096
REQUESTS = 3000

Ranges = tuple[tuple[int, int], tuple[int, int]]
DISTRIBUTIONS: dict[str, Ranges] = {  # least and most input and output tokens
    "D1": ((32, 4096), (2048, 4096)),
    "D2": ((3000, 5000), (3000, 5000)),
    "D3": ((2048, 4096), (32, 4096)),
}


class Outcome(NamedTuple):
    """Of a run: decode steps, mean memory use and evictions by finished requests, both in percent."""

    steps: float
    memory: float
    evictions: float


REFERENCE = {
    "aggressive": (Outcome(283_050, 98.4, 92.3), Outcome(620_360, 97.8, 94.7), Outcome(233_950, 98.2, 36.4)),
    "conservative": (Outcome(482_060, 57.5, 0), Outcome(845_040, 71.7, 0), Outcome(388_710, 59.9, 0)),
    "past-future": (Outcome(294_480, 93.4, 7.9), Outcome(654_120, 92.0, 7.4), Outcome(237_320, 94.6, 3.4)),
    "oracle": (Outcome(289_490, 94.5, 0), Outcome(653_010, 92.5, 0), Outcome(234_850, 96.7, 0)),
}


@dataclass(slots=True, eq=False)
class Simulated:
    """A sequence with its true output length. While it runs, `began` is the step at which it had generated nothing."""

    sequence: Sequence
    prompt: int
    output: int
    generated: int = 0
    began: int = 0

    def grow(self, step: int) -> None:
        """Bring the sequence to this step. Only the number of its tokens matters, so a range stands for them."""
        self.generated = step - self.began
        self.sequence.tokens = cast(list[int], range(self.prompt + self.generated))

    @property
    def held(self) -> int:
        return self.prompt + self.generated


@dataclass(slots=True)
class ByLengths:
    """Headrace's admission: the peak of demands by some `Lengths` may fill so many tokens."""

    lengths: Lengths
    capacity: float
    peak: Callable[[list[Demand]], int] = future_peak
    prompt_only: bool = False
    reserves: bool = False
    demands: list[Demand] = field(default_factory=list)

    def look(self, running: list[Simulated]) -> None:
        """Begin a round of admissions beside what runs."""
        self.demands = [self._demand(each) for each in running]

    def fits(self, candidate: Simulated) -> bool:
        """Whether it may enter beside what runs and what has entered in this round. After a no the round is over."""
        demand = self._demand(candidate)
        asked = demand._replace(held=candidate.prompt) if self.prompt_only else demand
        reserve = self.lengths.spread(len(self.demands) + 1) if self.reserves else 0
        fits = self.peak([*self.demands, asked]) + reserve <= self.capacity
        self.demands.append(demand)
        return fits

    def record(self, finished: Simulated) -> None:
        self.lengths.record(finished.sequence)

    def _demand(self, simulated: Simulated) -> Demand:
        # As in the engine: the last token is never stored.
        return Demand(max(self.lengths.remaining(simulated.sequence) - 1, 0), simulated.held, 1)


class RandomSets:
    """The paper's admission, asked in the same way: several sets of random lengths, all of which have to fit."""

    def __init__(self, capacity: float, seed: int) -> None:
        self.capacity = capacity
        self.draw = np.random.default_rng(seed)
        self.recent = deque([512] * 500, maxlen=1000)
        self.sets: list[list[Demand]] = [[]]

    def look(self, running: list[Simulated]) -> None:
        self.sets = [[]]
        if running:
            sets = min(5, 200 // len(running) + 1)
            remaining = self._sample(np.array([each.generated for each in running]), sets)
            held = [each.held for each in running]
            self.sets = [[Demand(r, h, 1) for r, h in zip(row, held, strict=True)] for row in remaining.tolist()]

    def _sample(self, generated: np.ndarray[Any, Any], sets: int) -> np.ndarray[Any, Any]:
        """Remaining tokens, [sets, running]: at a random place of (generated, the lengths above it, the most)."""
        ordered = np.sort(self.recent)
        below = np.searchsorted(ordered, generated, side="right")
        place = self.draw.random((sets, len(generated))) * (len(ordered) - below + 1)
        whole = place.astype(np.int64)
        index = below + whole
        most = np.maximum(np.maximum(generated, ordered[-1]), MAX_TOKENS)
        left = np.where(whole == 0, generated, ordered[np.maximum(index - 1, 0)])
        right = np.where(index == len(ordered), most, ordered[np.minimum(index, len(ordered) - 1)])
        remaining: np.ndarray[Any, Any] = np.rint(left + (right - left) * (place - whole)).astype(np.int64) - generated
        return remaining

    def fits(self, candidate: Simulated) -> bool:
        picks = self.draw.integers(len(self.recent), size=len(self.sets)).tolist()
        for demands, pick in zip(self.sets, picks, strict=True):
            demands.append(Demand(self.recent[pick], candidate.held, 1))
        return all(future_peak(demands) < self.capacity for demands in self.sets)

    def record(self, finished: Simulated) -> None:
        self.recent.append(finished.output)


Admission = ByLengths | RandomSets


def make_queue(ranges: Ranges, seed: int, max_tokens: int) -> Iterator[Simulated]:
    """The same lengths for every policy."""
    draw = random.Random(seed)
    params = SamplingParams(max_tokens=max_tokens)
    for number in range(REQUESTS):
        prompt, output = draw.randint(*ranges[0]), draw.randint(*ranges[1])
        request = Request(str(number), cast(tuple[int, ...], range(prompt)), params)
        yield Simulated(Sequence(request, 0, number, []), prompt, output)


class Simulation:
    """The artifact's loop. `memory` is what all that run hold, in tokens."""

    def __init__(self, admission: Admission, queue: Iterator[Simulated]) -> None:
        self.admission = admission
        self.queue = queue
        self.waiting: deque[Simulated] = deque()
        self.running: list[Simulated] = []
        self.step = self.memory = self.memory_total = self.finished = self.evictions = 0

    def run(self) -> Outcome:
        more = True
        while more:
            self.decode(ADMISSION_INTERVAL)
            more = self.admit()
        samples = self.step + self.step // ADMISSION_INTERVAL - 1  # the round that ended it is not counted
        memory = 100 * self.memory_total / samples / CAPACITY
        return Outcome(self.step, memory, 100 * self.evictions / self.finished)

    def decode(self, steps: int) -> None:
        """Some steps. Between one end and the next only the sum of memory changes."""
        ends = {each.began + each.output for each in self.running}
        for _ in range(steps):
            self.step += 1
            self.memory += len(self.running)
            if self.step in ends:
                for each in [each for each in self.running if each.began + each.output == self.step]:
                    self.remove(each)
                    self.admission.record(each)
                    self.finished += 1
            self.memory_total += self.memory
            while self.memory > CAPACITY:
                self.waiting.appendleft(self.remove(self.running[-1]))
                self.evictions += 1

    def remove(self, leaving: Simulated) -> Simulated:
        self.running.remove(leaving)
        leaving.grow(self.step)
        self.memory -= leaving.held
        return leaving

    def admit(self) -> bool:
        """A round of admissions; False if there was nobody left to ask."""
        if self.waiting and self.memory + self.waiting[0].prompt > self.admission.capacity:
            self.memory_total += self.memory  # no peak is below what is held: nothing to predict
            return True
        for each in self.running:
            each.grow(self.step)
        self.admission.look(self.running)
        admitted_tokens = 0
        while admitted_tokens < ADMITTED_TOKENS:
            if not self.waiting:
                fresh = next(self.queue, None)
                if fresh is None:
                    return False
                self.waiting.append(fresh)
            candidate = self.waiting[0]
            candidate.began = self.step - candidate.generated
            candidate.grow(self.step)
            if not self.admission.fits(candidate):
                break
            self.running.append(self.waiting.popleft())
            self.memory += candidate.held
            admitted_tokens += candidate.prompt
        self.memory_total += self.memory
        return True


def sum_of_ends(demands: list[Demand]) -> int:
    """As if all ended at the same moment."""
    return sum(each.held + each.rate * each.remaining for each in demands)


def make_policies(ranges: Ranges, seed: int) -> dict[str, tuple[Admission, int]]:
    """By name, after a colon where it is Headrace's own: the admission, and the `max_tokens` of its requests."""
    known = max(MAX_TOKENS, ranges[1][1])
    outputs = {each.sequence.number: each.output for each in make_queue(ranges, seed, known)}
    return {
        "aggressive": (ByLengths(AggressiveLengths(), 0.99 * CAPACITY, prompt_only=True), MAX_TOKENS),
        "conservative": (ByLengths(ConservativeLengths(), CAPACITY, sum_of_ends), MAX_TOKENS),
        "past-future": (RandomSets(0.97 * CAPACITY, seed), MAX_TOKENS),
        "oracle": (ByLengths(OracleLengths(outputs), CAPACITY), known),
        "past-future: forecast, 97 %": (ByLengths(LengthForecast(), 0.97 * CAPACITY), known),
        "past-future: forecast, 100 %": (ByLengths(LengthForecast(), CAPACITY), known),
        "past-future: as shipped": (ByLengths(LengthForecast(), CAPACITY, reserves=True), known),
        "conservative: by peak": (ByLengths(ConservativeLengths(), CAPACITY), known),
    }


def run_all(seeds: int) -> dict[tuple[str, str], Outcome]:
    """Means over the seeds, by policy and distribution."""
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    for name, ranges in DISTRIBUTIONS.items():
        for seed in range(seeds):
            for policy, (admission, max_tokens) in make_policies(ranges, seed).items():
                outcome = Simulation(admission, make_queue(ranges, seed, max_tokens)).run()
                outcomes.setdefault((policy, name), []).append(outcome)
    return {key: Outcome(*map(statistics.mean, zip(*runs, strict=True))) for key, runs in outcomes.items()}


def print_table(outcomes: dict[tuple[str, str], Outcome]) -> None:
    """Ours beside the reference, and whether steps differ by at most 3 % and evictions by at most 3 points."""
    print("| policy | lengths | steps | ref. | by | memory % | ref. | evictions % | ref. | by points | within |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|")
    for (policy, name), ours in sorted(outcomes.items(), key=lambda item: list(outcomes).index((item[0][0], "D1"))):
        theirs = REFERENCE[policy.split(":")[0]][list(DISTRIBUTIONS).index(name)]
        steps = 100 * (ours.steps / theirs.steps - 1)
        points = ours.evictions - theirs.evictions
        within = "yes" if abs(steps) <= 3 and abs(points) <= 3 else "NO"
        print(
            f"| {policy} | {name} | {ours.steps:,.0f} | {theirs.steps:,.0f} | {steps:+.1f} % "
            f"| {ours.memory:.1f} | {theirs.memory:.1f} | {ours.evictions:.1f} | {theirs.evictions:.1f} "
            f"| {points:+.1f} | {'' if ':' in policy else within} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="runs to take the mean of")
    print_table(run_all(parser.parse_args().seeds))


if __name__ == "__main__":
    main()
