"""How many tokens will a sequence still generate? Learned from the past, or assumed.

After the Past-Future scheduler, arXiv 2507.10150, section 3: the "past" is the distribution of recent output lengths.
The aggressive, the conservative and the oracle are what its evaluation compares with.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Protocol

from headrace.core import Constraint, Request, Sequence

WINDOW = 1000
FEWEST_LENGTHS = 32
MOST_KINDS = 64
GOLDEN = 2654435769  # 2^32 / golden ratio

Kind = tuple[int, Constraint | None]


class Lengths(Protocol):
    """What an admission is based on."""

    def record(self, sequence: Sequence) -> None:
        """Learn from a sequence that has just finished."""

    def remaining(self, sequence: Sequence) -> int:
        """Tokens that the sequence is thought to generate from now on; at least 1 if it generates. Changes nothing.

        The same answer whenever it is asked between two calls of `record` with as many tokens generated.
        """

    def spread(self, count: int) -> int:
        """By how many tokens the predictions for `count` sequences together may well be too low."""

    def expected(self, request: Request) -> float:
        """Tokens that a request is thought to generate in all, before it has begun: rows are ordered by it."""


@dataclass(slots=True)
class LengthWindow:
    """The last 1000 of some output lengths: as they came, and sorted."""

    recent: deque[int] = field(default_factory=deque)
    ordered: list[int] = field(default_factory=list)
    total: int = 0
    squares: int = 0

    def __len__(self) -> int:
        return len(self.ordered)

    def add(self, length: int) -> None:
        if len(self.recent) == WINDOW:
            oldest = self.recent.popleft()
            del self.ordered[bisect_left(self.ordered, oldest)]
            self.total -= oldest
            self.squares -= oldest * oldest
        self.recent.append(length)
        insort(self.ordered, length)
        self.total += length
        self.squares += length * length

    def quantile_above(self, floor: int, quantile: int) -> int | None:
        """Of the lengths above `floor`, the one at `quantile` / 2^32 (0 <= quantile < 2^32); None if there is none."""
        below = bisect_right(self.ordered, floor)
        above = len(self.ordered) - below
        return self.ordered[below + (quantile * above >> 32)] if above else None


class LengthForecast:
    """Predicts the remaining tokens from the last 1000 finished output lengths of the same kind of task.

    The paper draws each prediction at random from the lengths above what is generated so far. Here sequence number s
    takes the fixed quantile frac(s / golden ratio) of them: predictions repeat exactly, and those of any run of
    sequences spread evenly over the distribution, so a batch is predicted with its short and its long members.

    Tasks that share one history mislead each other, so requests with equal `max_tokens` and `constraint` are a kind
    of their own. A kind with fewer than 32 known lengths is predicted from those of all kinds. The 64 kinds that
    learned last are kept.
    """

    def __init__(self, context_length: int | None = None) -> None:
        self.context_length = context_length
        self._all = LengthWindow()
        self._kinds: OrderedDict[Kind, LengthWindow] = OrderedDict()

    def record(self, sequence: Sequence) -> None:
        """Learn a finished length, where it was the model's choice: not one with `ignore_eos`."""
        request = sequence.request
        if request.params.ignore_eos or not request.generates:
            return
        length, kind = sequence.output_length, kind_of(request)
        self._all.add(length)
        self._kinds.setdefault(kind, LengthWindow()).add(length)
        self._kinds.move_to_end(kind)
        if len(self._kinds) > MOST_KINDS:
            self._kinds.popitem(last=False)

    def remaining(self, sequence: Sequence) -> int:
        """Tokens that the sequence is predicted to generate from now on; at least 1 if it generates.

        What `max_tokens` and the context allow where that is certain (`ignore_eos`), where fewer than 32 lengths are
        known, and where no known length is above what is generated already.
        """
        request = sequence.request
        if not request.generates:
            return 0
        most = most_remaining(sequence, self.context_length)
        window = self._known(request)
        if window is None or request.params.ignore_eos:
            return most
        generated = len(sequence.tokens) - len(request.prompt_token_ids)
        length = window.quantile_above(generated, sequence.number * GOLDEN & 0xFFFFFFFF)
        return most if length is None else min(most, length - generated)

    def spread(self, count: int) -> int:
        """One standard deviation of the sum of `count` lengths; 0 while nothing is predicted from the past.

        The paper reserves 3 to 5 % of the memory whatever is in it. That is about this much for the some 40 rows of its
        simulation, and too little for a small pool: what many rows have in common evens out, what few have does not.
        """
        known = len(self._all)
        if known < FEWEST_LENGTHS:
            return 0
        return isqrt(count * (known * self._all.squares - self._all.total**2) // known**2)

    def expected(self, request: Request) -> float:
        """Mean output length of the request's kind, or of all; the most that it may have if fewer than 32 are known."""
        most, window = most_output(request), self._known(request)
        return most if window is None or request.params.ignore_eos else min(window.total / len(window), most)

    def _known(self, request: Request) -> LengthWindow | None:
        """The lengths that predict the request: its kind's, else all, else none."""
        window = self._kinds.get(kind_of(request))
        if window is None or len(window) < FEWEST_LENGTHS:
            window = self._all
        return window if len(window) >= FEWEST_LENGTHS else None


class AggressiveLengths:
    """Every sequence is taken to be about to end: room for what is held now is enough. The most preemptions."""

    def __init__(self, context_length: int | None = None) -> None:
        """Takes a context length as the others do, and has no use for it."""

    def record(self, sequence: Sequence) -> None:
        """Nothing to learn."""

    def remaining(self, sequence: Sequence) -> int:
        """1, or 0 for what generates nothing."""
        return int(sequence.request.generates)

    def spread(self, count: int) -> int:
        """0."""
        return 0

    def expected(self, request: Request) -> float:
        """The most that it may have."""
        return most_output(request)


class ConservativeLengths:
    """Every sequence is taken to use all that `max_tokens` and the context allow. No preemption, the fewest running."""

    def __init__(self, context_length: int | None = None) -> None:
        self.context_length = context_length

    def record(self, sequence: Sequence) -> None:
        """Nothing to learn."""

    def remaining(self, sequence: Sequence) -> int:
        """What is allowed; at least 1, or 0 for what generates nothing."""
        return most_remaining(sequence, self.context_length) if sequence.request.generates else 0

    def spread(self, count: int) -> int:
        """0."""
        return 0

    def expected(self, request: Request) -> float:
        """The most that it may have."""
        return most_output(request)


class OracleLengths:
    """Knows every true output length by its sequence's number: the most that any forecast could do."""

    def __init__(self, true_lengths: Mapping[int, int] | Callable[[int], int]) -> None:
        self._true_length = true_lengths.__getitem__ if isinstance(true_lengths, Mapping) else true_lengths

    def record(self, sequence: Sequence) -> None:
        """Nothing to learn."""

    def remaining(self, sequence: Sequence) -> int:
        """What is truly left; at least 1 if it generates. Raises KeyError for a number that a mapping lacks."""
        if not sequence.request.generates:
            return 0
        return max(self._true_length(sequence.number) - sequence.output_length, 1)

    def spread(self, count: int) -> int:
        """0."""
        return 0

    def expected(self, request: Request) -> float:
        """The most that it may have: the truth is known by a sequence's number, which a request has not."""
        return most_output(request)


def kind_of(request: Request) -> Kind:
    """Requests of one kind are taken to have output lengths of one distribution."""
    return request.params.max_tokens, request.params.constraint


def most_output(request: Request) -> float:
    return float(request.params.max_tokens) if request.generates else 0.0


def most_remaining(sequence: Sequence, context_length: int | None) -> int:
    """Tokens that a sequence may still generate by its `max_tokens` and the model's context; at least 1."""
    known = len(sequence.tokens)
    most = len(sequence.request.prompt_token_ids) + sequence.request.params.max_tokens
    return max((most if context_length is None else min(most, context_length)) - known, 1)


# By the option's name; each takes the context length in tokens, or None.
ADMISSIONS: dict[str, Callable[[int | None], Lengths]] = {
    "forecast": LengthForecast,
    "aggressive": AggressiveLengths,
    "conservative": ConservativeLengths,
}
