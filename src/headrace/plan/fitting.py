"""Measure what steps take: some two hundred steps of the real engine, each of one kind, and a small pile as a check."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

import torch

from headrace.core import Request, SamplingParams
from headrace.llm import LLM
from headrace.meter.energy import EnergyCounter
from headrace.meter.operations import Piece
from headrace.meter.peaks import ATTEMPTS, MOST_SCATTER, NoisyMachine, describe_machine
from headrace.meter.step_time import StepTime, Table, describe_setting
from headrace.plan.prober import Probe, Prober
from headrace.plan.simulator import Memory, Simulator, Task

TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
WANTED = (1, 2, 4, 8, 16, 32, 64, 128)
ROUNDS = 2
# Of what is a difference of two measurements: of three the one in the middle knows nothing of a disturbed one.
PAIR_ROUNDS = 3
MOST_ERROR = 0.15
SHORT, LONG = 16, 1024
# Prompts that are computed for the sake of what follows them are as short as can be.
BRIEF = 1

Tell = Callable[[str], None]


def fit_step_time(llm: LLM, tell: Tell) -> StepTime:
    """Measure the step times of a loaded model; takes about a minute for small ones.

    Raises NoisyMachine where times scatter too much to be believed, InputError where the KV memory is too small.
    """
    prober, energy, began = Prober(llm), EnergyCounter(), time.perf_counter()
    machine = describe_machine(llm.resolved["instruction_set"])
    setting, windows = describe_setting(llm.model_hash, machine, llm.resolved), llm.engine.model.config.windows
    nothing = ((1, 0.0), (2, 0.0))
    found = StepTime(setting, nothing, nothing, chunk=0.0, own=0.0, shared=0.0, windows=windows, error=0.0)
    tell("warming up")
    prober.time_chunk(64)
    found = fit_parts(prober, found, tell)
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


def fit_parts(prober: Prober, found: StepTime, tell: Tell) -> StepTime:
    """Everything but the error, each with what was found before it taken off."""
    found = replace(found, chunk=fit_chunk(prober, found, tell))
    found = replace(found, tokens=fit_tokens(prober, found, tell))
    found = replace(found, own=fit_context(prober, found, "own", tell))
    # Where no prefixes are shared no step will have such pairs.
    sharing = prober.engine.state.ledger.prefix_cache
    found = replace(found, shared=fit_context(prober, found, "shared", tell) if sharing else found.own)
    return replace(found, wanted=fit_wanted(prober, found, tell))


def fit_tokens(prober: Prober, found: StepTime, tell: Tell) -> Table:
    """Seconds by tokens: of several rounds over all sizes the least, so that a moment in which something else ran
    counts in none. A step never takes longer than a larger one."""
    sizes = [each for each in TOKENS if prober.fits(each)]
    rounds: list[list[Probe]] = []
    for turn in range(ROUNDS):
        tell(f"chunks of 1 to {sizes[-1]} tokens, round {turn + 1} of {ROUNDS}")
        rounds.append([prober.time_chunk(size) for size in sizes])
    best = [confirm(prober, size, list(probes)) for size, probes in zip(sizes, zip(*rounds, strict=True), strict=True)]
    least = list(accumulate((probe.seconds for probe in reversed(best)), min))[::-1]
    return [(size, each - found.attend(probe.pieces)) for size, each, probe in zip(sizes, least, best, strict=True)]


def confirm(prober: Prober, size: int, probes: list[Probe]) -> Probe:
    """The least of probes, and of further ones until another is within a fifth of it: a long step is one sample, and
    says nothing of how it scatters. Raises NoisyMachine after ATTEMPTS."""
    while True:
        best, second = sorted(probes, key=lambda probe: probe.seconds)[:2]
        if second.seconds / best.seconds - 1 <= 2 * MOST_SCATTER:
            return best
        if len(probes) >= ATTEMPTS:
            raise NoisyMachine(
                f"chunks of {size} tokens: none of {ATTEMPTS} measurements is within {2 * MOST_SCATTER:.0%} of the "
                "least: something else uses this machine; try again when it is quiet"
            )
        probes.append(prober.time_chunk(size))


def fit_chunk(prober: Prober, found: StepTime, tell: Tell) -> float:
    """Seconds a pair of a token and one that it sees, in chunks: the slope over the chunks of a long prompt."""
    length = min(256, prober.context // 8, prober.most_chunk)
    tell("a long prompt")
    tries = [prober.time_chunks(length, 7) for _ in range(ROUNDS)]
    seconds = [min(times) for times in zip(*tries, strict=True)]
    pairs = [count_pairs(found, "chunk", [Piece(length * place, length, 0, False)]) for place in range(7)]
    return max(0.0, statistics.linear_regression(pairs, seconds).slope)


def fit_context(prober: Prober, found: StepTime, kind: Literal["own", "shared"], tell: Tell) -> float:
    """Seconds a pair in steps of one token a sequence: over each one's own context, or over one that all read."""
    # A shared token costs far less than an own one: it takes many to be told from what a step varies by.
    shared = kind == "shared"
    sequences, far = (min(64, prober.limits.max_sequences), 2 * LONG) if shared else (4, LONG)
    far = min(far, prober.context // 2)
    piles = [prober.draw_prompts(sequences, context, shared) for context in (SHORT, far)]
    tell(f"contexts of {far} tokens")
    # In turn, so that what the machine does meanwhile counts for both.
    rounds = [[prober.time_decode(prompts) for prompts in piles] for _ in range(ROUNDS)]
    low, high = (min(probes, key=lambda probe: probe.seconds) for probes in zip(*rounds, strict=True))
    pairs = count_pairs(found, kind, high.pieces) - count_pairs(found, kind, low.pieces)
    # A policy may read no more of a long context than of a short one.
    return max(0.0, subtract(found, high, low)) / pairs if pairs > 0 else found.own


def fit_wanted(prober: Prober, found: StepTime, tell: Tell) -> Table:
    """Seconds by rows whose next token is chosen: what a step of such rows takes beyond a chunk of as many tokens."""

    def measure(count: int, turn: int) -> tuple[Probe, Probe]:
        tell(f"{count} sequences, round {turn + 1} of {PAIR_ROUNDS}")
        # Beside each other: a difference of two moments a minute apart would be the machine's.
        return prober.time_decode(prober.draw_prompts(count, BRIEF)), prober.time_chunk(count)

    counts = [each for each in WANTED if each <= prober.limits.max_sequences and prober.fits(each)]
    rounds = [[measure(count, turn) for count in counts] for turn in range(PAIR_ROUNDS)]
    pairs = list(zip(*rounds, strict=True))
    seconds = [statistics.median(decode.seconds for decode, _ in each) for each in pairs]
    more = [statistics.median(subtract(found, decode, chunk) for decode, chunk in each) for each in pairs]
    first, each_row = fit_line(counts, more, seconds)
    return [(count, first + each_row * count) for count in (1, WANTED[-1])]


def fit_line(rows: Sequence[int], more: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds a step and seconds a row, neither below 0, that so `more` seconds in steps of so many `seconds` come to.

    A line, because choosing is the product with the head, which reads its weights once and then costs the same for each
    row. By least squares of errors as shares of the whole step: by such shares measurements err.
    """
    whole = torch.tensor(seconds, dtype=torch.float64)
    equations = torch.stack([torch.ones_like(whole), torch.tensor(rows)], 1) / whole[:, None]
    wanted = torch.tensor(more, dtype=torch.float64)[:, None] / whole[:, None]
    lines = []
    # Where the best line goes below 0, the best of those that do not has one of both at 0.
    for columns in ([0, 1], [0], [1]):
        line = torch.zeros(2, 1, dtype=whole.dtype)
        line[columns] = torch.linalg.lstsq(equations[:, columns], wanted).solution.clamp(min=0)
        lines.append(line)
    first, each = min(lines, key=lambda line: float((equations @ line - wanted).square().sum())).flatten().tolist()
    return first, each


def subtract(found: StepTime, more: Probe, less: Probe) -> float:
    """By how many seconds one step took longer than another, what is known of attention taken off both."""
    return more.seconds - found.attend(more.pieces) - (less.seconds - found.attend(less.pieces))


def count_pairs(found: StepTime, kind: Literal["chunk", "own", "shared"], pieces: Sequence[Piece]) -> float:
    """Pairs of one kind of a token and one that it sees, over all layers: the seconds of a machine on which each takes
    one, so that they are counted here as where a time is foreseen."""
    chunk, own, shared = (float(kind == each) for each in ("chunk", "own", "shared"))
    return replace(found, chunk=chunk, own=own, shared=shared).attend(pieces)


def run_check(llm: LLM, prober: Prober, found: StepTime) -> float:
    """By which share a small mixed pile takes longer than predicted."""
    tasks = list(make_check(prober))
    began = time.perf_counter()
    for task in tasks:
        llm.engine.add(task.request)
    while llm.engine.unfinished:
        llm.engine.step()
    seconds = time.perf_counter() - began
    return seconds / Simulator(llm.options, Memory.of_engine(llm.engine), found).run(tasks).seconds - 1


def make_check(prober: Prober) -> Iterator[Task]:
    draw = random.Random(1)
    most = min(256, prober.context // 2)
    for number in range(24):
        output = draw.randrange(8, 32)
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        yield Task(Request(f"check {number}", prober.text(draw.randrange(16, most)), params), output)
