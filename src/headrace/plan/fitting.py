"""Measure what steps take: some two hundred steps of the real engine, each of one kind, and a small pile as a check."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate

from headrace.core import Request, SamplingParams
from headrace.llm import LLM
from headrace.meter.energy import EnergyCounter
from headrace.meter.operations import count_seen
from headrace.meter.peaks import ATTEMPTS, MOST_SCATTER, NoisyMachine, describe_machine
from headrace.meter.step_time import StepTime, describe_setting, interpolate
from headrace.options import EngineOptions
from headrace.plan.simulator import Memory, Simulator, Task

TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
WANTED = (1, 2, 4, 8, 16, 32, 64, 128)
ROUNDS, SAMPLES = 2, 3
MOST_ERROR = 0.15
SHORT, LONG = 16, 1024

Tell = Callable[[str], None]


class Prober:
    """Makes an engine compute steps of a wanted form and times them. Nothing runs before and after."""

    def __init__(self, llm: LLM) -> None:
        self.engine = llm.engine
        self.context = llm.context_length
        self.limits = llm.engine.state.limits
        self._draw = random.Random(0)
        self._names: list[str] = []
        self._made = 0

    def text(self, length: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(self.engine.model.config.vocab_size) for _ in range(length))

    def add(self, prompt: tuple[int, ...], output: int) -> None:
        self._made += 1
        self._names.append(f"probe {self._made}")
        self.engine.add(Request(self._names[-1], prompt, SamplingParams(max_tokens=output, ignore_eos=True)))

    def step(self) -> float:
        began = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - began

    def limit(self, step_tokens: int) -> None:
        self.engine.state.limits = replace(self.limits, step_tokens=step_tokens)

    def clear(self) -> None:
        for name in self._names:
            self.engine.abort(name)
        self._names.clear()
        self.engine.state.limits = self.limits

    def time_chunk(self, length: int) -> float:
        """Seconds of a chunk of so many tokens at the start of a prompt, no token chosen."""
        return settle(lambda: self.time_chunks(length, 1)[0], f"chunks of {length} tokens")

    def time_chunks(self, length: int, chunks: int) -> list[float]:
        """Seconds of neighbouring chunks of one prompt."""
        self.add(self.text(length * chunks + SHORT), 1)
        self.limit(length)
        seconds = [self.step() for _ in range(chunks)]
        self.clear()
        return seconds

    def time_decode(self, sequences: int, context: int, shared: bool = False) -> float:
        """Seconds of a step that gives each of these sequences a token; with a context that is one's own or all's."""
        prefix = self.text(context) if shared else ()
        # Prompts are computed at once, so that none has ended when the last one begins to generate.
        self.limit(sequences * (context + SHORT + 1))
        for _ in range(sequences):
            self.add((prefix or self.text(context)) + self.text(SHORT if shared else 1), ATTEMPTS * SAMPLES + 4)
        while any(each.output_length == 0 for each in self.engine.state.sequences.values()):
            self.engine.step()
        seconds = settle(self.step, f"steps of {sequences} sequences at {context} tokens")
        assert len(self.engine.state.running) == sequences
        self.clear()
        return seconds


def settle(sample: Callable[[], float], what: str) -> float:
    """The median of a few samples. Raises NoisyMachine where their middle half still scatters by more than a fifth."""
    for _ in range(ATTEMPTS):
        seconds = [sample() for _ in range(SAMPLES)]
        low, middle, high = statistics.quantiles(seconds, n=4)
        if (high - low) / middle <= 2 * MOST_SCATTER:
            return middle
    raise NoisyMachine(
        f"{what}: {SAMPLES} measurements scatter by {(high - low) / middle:.0%} (at most {2 * MOST_SCATTER:.0%} is "
        "believed): something else uses this machine; try again when it is quiet"
    )


def fit_step_time(llm: LLM, tell: Tell) -> StepTime:
    """Measure the step times of a loaded model; takes less than a minute for small ones on a fast processor.

    Raises NoisyMachine where times scatter too much to be believed.
    """
    prober, windows = Prober(llm), llm.engine.model.config.windows
    energy, began = EnergyCounter(), time.perf_counter()
    machine = describe_machine(llm.resolved["instruction_set"])
    found = StepTime(
        setting=describe_setting(llm.model_hash, machine, llm.resolved),
        tokens=((1, 0.0), (2, 0.0)),
        wanted=((1, 0.0), (2, 0.0)),
        chunk=0.0,
        own=0.0,
        shared=0.0,
        windows=windows,
        error=0.0,
    )
    tell("warming up")
    prober.time_chunk(64)
    found = replace(found, chunk=fit_chunk(prober, windows, tell))
    lengths = [each for each in TOKENS if each + SHORT < prober.context]
    seconds = time_forms(lengths, "chunks of {} tokens", prober.time_chunk, tell)
    pairs = [count_pairs(windows, 0, length) for length in lengths]
    tokens = [(n, each - found.chunk * seen) for n, each, seen in zip(lengths, seconds, pairs, strict=True)]
    found = replace(found, tokens=tuple(tokens))
    own, shared = (fit_context(prober, windows, name == "shared", tell) for name in ("own", "shared"))
    found = replace(found, own=own, shared=shared)
    counts = [each for each in WANTED if each <= prober.limits.max_sequences]
    seconds = time_forms(counts, "{} sequences", lambda count: prober.time_decode(count, SHORT), tell)
    rest = found.own * count_pairs(windows, SHORT, 1)
    wanted = [
        (n, max(0.0, each - interpolate(found.tokens, n) - n * rest)) for n, each in zip(counts, seconds, strict=True)
    ]
    found = replace(found, wanted=tuple(wanted))
    tell("a small pile")
    # The least of rounds is what steps take at best: a pile says how far from it they are in the long run.
    found = found.scale(1 + run_check(llm, prober, found))
    found = replace(found, error=abs(run_check(llm, prober, found)))
    if found.error > MOST_ERROR:
        raise NoisyMachine(
            f"a small pile took {found.error:.0%} more or less than foreseen (at most {MOST_ERROR:.0%} is believed): "
            "something else uses this machine; try again when it is quiet"
        )
    joules = energy.read()
    return replace(found, watts=None if joules is None else joules / (time.perf_counter() - began))


def time_forms(sizes: list[int], what: str, measure: Callable[[int], float], tell: Tell) -> list[float]:
    """Seconds of steps of growing size: of several rounds over all sizes the least, so that a moment in which something
    else ran counts in none. A step never takes longer than a larger one."""
    best = [math.inf] * len(sizes)
    for turn in range(ROUNDS):
        for place, size in enumerate(sizes):
            tell(f"{what.format(size)}, round {turn + 1} of {ROUNDS}")
            best[place] = min(best[place], measure(size))
    return list(accumulate(reversed(best), min))[::-1]


def fit_chunk(prober: Prober, windows: tuple[int | None, ...], tell: Tell) -> float:
    """Seconds a pair of a token and one that it sees, in chunks: the slope over the chunks of a long prompt."""
    length = min(512, prober.context // 8)
    tell("a long prompt")
    tries = [prober.time_chunks(length, 7) for _ in range(ROUNDS)]
    seconds = [min(times) for times in zip(*tries, strict=True)]
    pairs = [count_pairs(windows, length * place, length) for place in range(7)]
    return max(0.0, statistics.linear_regression(pairs, seconds).slope)


def fit_context(prober: Prober, windows: tuple[int | None, ...], shared: bool, tell: Tell) -> float:
    """Seconds a pair in steps of one token a sequence: over each one's own context, or over one that all read."""
    # A shared token costs far less than an own one: it takes many to be told from what a step varies by.
    sequences, far = (min(64, prober.limits.max_sequences), 2 * LONG) if shared else (8, LONG)
    far = min(far, prober.context // 2)
    tell(f"contexts of {far} tokens")
    # In turn, so that what the machine does meanwhile counts for both.
    rounds = [[prober.time_decode(sequences, context, shared) for context in (SHORT, far)] for _ in range(ROUNDS)]
    near_seconds, far_seconds = min(near for near, _ in rounds), min(far for _, far in rounds)
    pairs = sequences * (count_pairs(windows, far, 1) - count_pairs(windows, SHORT, 1))
    return max(0.0, far_seconds - near_seconds) / max(1, pairs)


def count_pairs(windows: tuple[int | None, ...], start: int, length: int) -> int:
    """Pairs of a token and one that it sees, over all layers."""
    return sum(count_seen(start, length, window) for window in windows)


def run_check(llm: LLM, prober: Prober, found: StepTime) -> float:
    """By which share a small mixed pile takes longer than predicted."""
    tasks = list(make_pile(prober))
    began = time.perf_counter()
    for task in tasks:
        llm.engine.add(task.request)
    while llm.engine.unfinished:
        llm.engine.step()
    seconds = time.perf_counter() - began
    memory = Memory.of_engine(llm.engine)
    names = EngineOptions.__dataclass_fields__
    options = EngineOptions(**{name: value for name, value in llm.resolved.items() if name in names})
    return seconds / Simulator(options, memory, found).run(tasks).seconds - 1


def make_pile(prober: Prober) -> Iterator[Task]:
    draw = random.Random(1)
    most = min(256, prober.context // 2)
    for number in range(24):
        output = draw.randrange(8, 32)
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        yield Task(Request(f"check {number}", prober.text(draw.randrange(16, most)), params), output)
