"""Steps of a wanted form, computed by the real engine and timed."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from headrace.core import Chunk, InputError, Request, SamplingParams
from headrace.llm import LLM
from headrace.meter.operations import Piece
from headrace.meter.peaks import ATTEMPTS, MOST_SCATTER, NoisyMachine
from headrace.schedule.pieces import describe_pieces

SAMPLES = 3
# A step of so many seconds averages what disturbs it: one sample of it says what several would.
LONG_STEP = 0.1
# Prompts of which a step computes a part are so much longer: none is computed to its end.
BEYOND = 16


class Probe(NamedTuple):
    """Seconds of a step, and its pieces, as the meter and the simulator describe them."""

    seconds: float
    pieces: list[Piece]


class Prober:
    """Makes an engine compute steps of a wanted form and times them. Nothing runs before and after."""

    def __init__(self, llm: LLM) -> None:
        self.engine = llm.engine
        self.context = llm.context_length
        self.limits = llm.engine.state.limits
        self.layout = llm.engine.cache.layout
        # What one step may compute of one prompt.
        self.most_chunk = self.layout.most_chunk or llm.context_length
        self._draw = random.Random(0)
        self._names: list[str] = []

    def text(self, length: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(self.engine.model.config.vocab_size) for _ in range(length))

    def add(self, prompt: tuple[int, ...], output: int) -> None:
        self._names.append(f"probe {len(self._names)}")
        self.engine.add(Request(self._names[-1], prompt, SamplingParams(max_tokens=output, ignore_eos=True)))

    def step(self) -> float:
        began = time.perf_counter()
        self.engine.step()
        if self.engine.cache.device != "cpu":
            torch.cuda.synchronize()  # a step that chooses no token does not wait for its arithmetic
        return time.perf_counter() - began

    def limit(self, step_tokens: int) -> None:
        self.engine.state.limits = replace(self.limits, step_tokens=step_tokens)

    def clear(self) -> None:
        for name in self._names:
            self.engine.abort(name)
        self._names.clear()
        self.engine.state.limits = self.limits

    def fits(self, tokens: int) -> bool:
        """Whether a step may compute so many tokens without reaching a prompt's end."""
        prompts = -(-tokens // self.most_chunk)
        return prompts <= self.limits.max_sequences and min(tokens, self.most_chunk) + BEYOND < self.context

    def time_chunk(self, tokens: int) -> Probe:
        """A step of so many tokens at the start of a prompt, or of several where the layout bounds its chunks."""
        parts = [min(self.most_chunk, tokens - start) for start in range(0, tokens, self.most_chunk)]

        def sample() -> float:
            for _ in parts:
                self.add(self.text(parts[0] + BEYOND), 1)
            return self._time_prompts(tokens, 1)[0]

        seconds = settle(sample, f"chunks of {tokens} tokens")
        return Probe(statistics.median(seconds), [Piece(0, part, 0, False) for part in parts])

    def time_chunks(self, length: int, chunks: int) -> list[float]:
        """Seconds of neighbouring chunks of one prompt."""
        self.add(self.text(length * chunks + BEYOND), 1)
        return self._time_prompts(length, chunks)

    def _time_prompts(self, tokens: int, steps: int) -> list[float]:
        """Seconds of steps of so many tokens of the prompts that wait; none of them is computed to its end."""
        before = self.engine.counters.computed_prompt_tokens
        self.limit(tokens)
        seconds = [self.step() for _ in range(steps)]
        require(self.engine.counters.computed_prompt_tokens - before == tokens * steps, f"{tokens} tokens")
        self.clear()
        return seconds

    def draw_prompts(self, sequences: int, context: int, shared: bool = False) -> list[tuple[int, ...]]:
        """Prompts of so many tokens and one of their own; the others are one's own, too, or all's."""
        prefix = self.text(context) if shared else ()
        return [(prefix or self.text(context)) + self.text(1) for _ in range(sequences)]

    def time_decode(self, prompts: Sequence[tuple[int, ...]]) -> Probe:
        """A step that gives each of these prompts a token. Computed once, they may be found in the cache again."""
        # Prompts are computed at once, so that none has ended when the last one begins to generate.
        self.limit(sum(map(len, prompts)))
        for prompt in prompts:
            self.add(prompt, ATTEMPTS * SAMPLES + 4)
        while any(each.output_length == 0 for each in self.engine.state.sequences.values()):
            self.engine.step()
        looked = []

        def sample() -> float:
            looked.append(self._look())
            return self.step()

        seconds = settle(sample, f"steps of {len(prompts)} sequences at {len(prompts[0])} tokens")
        require(len(self.engine.state.running) == len(prompts), f"{len(prompts)} sequences")
        self.clear()
        # Contexts grow from step to step: those of the sample in the middle.
        return Probe(statistics.median(seconds), looked[-1 - len(seconds) // 2])

    def _look(self) -> list[Piece]:
        """The next step of what runs, a token of each. What a policy leaves of a context, or chooses of it, is what
        counts, as it does where a time is foreseen."""
        state = self.engine.state
        scheduled = [(Chunk(each.number, each.computed, 1), each) for each in state.running]
        return describe_pieces(scheduled, self.layout, state.ledger.pool.references)


def require(fitted: bool, what: str) -> None:
    if not fitted:
        raise InputError(f"the KV memory is too small to measure steps of {what}: free some memory")


def settle(sample: Callable[[], float], what: str) -> list[float]:
    """A few samples, or one of a long step. Raises NoisyMachine where their middle half still scatters by more than a
    fifth."""
    for _ in range(ATTEMPTS):
        seconds = [sample()]
        if seconds[0] > LONG_STEP:
            return seconds
        seconds += [sample() for _ in range(SAMPLES - 1)]
        low, middle, high = statistics.quantiles(seconds, n=4)
        if (high - low) / middle <= 2 * MOST_SCATTER:
            return seconds
    raise NoisyMachine(
        f"{what}: {SAMPLES} measurements scatter by {(high - low) / middle:.0%} (at most {2 * MOST_SCATTER:.0%} is "
        "believed): something else uses this machine; try again when it is quiet"
    )
