"""What a compressed cache loses on shared contexts, from numbers measured elsewhere. Arithmetic only: no model.

Task accuracy alone says little of a small model, which often fails with its full cache too. So what counts is how far
the policy moves from the full cache, and accuracy only where the full cache is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True, slots=True)
class TurnScore:
    """One turn with one cache.

    logprobs: log-probability (natural logarithm) of each token of the gold answer, the gold tokens before it given.
    agrees: for each of these tokens, whether this cache's likeliest token there is also the full cache's; all true for
    the full cache itself. correct: whether the answer was right, by its own generation or by the likeliest choice.
    """

    logprobs: tuple[float, ...]
    agrees: tuple[bool, ...]
    correct: bool

    def __post_init__(self) -> None:
        if not self.logprobs or len(self.logprobs) != len(self.agrees):
            raise ValueError(f"{len(self.logprobs)} log-probabilities beside {len(self.agrees)} agreements of a turn")


@dataclass(frozen=True, slots=True)
class EpisodeScores:
    """The same turns, in their order, with the full cache and with a policy."""

    full: tuple[TurnScore, ...]
    policy: tuple[TurnScore, ...]

    def __post_init__(self) -> None:
        shapes = [[len(turn.logprobs) for turn in turns] for turns in (self.full, self.policy)]
        if not self.full or shapes[0] != shapes[1]:
            raise ValueError(f"turns of {shapes[0]} tokens with the full cache and of {shapes[1]} with the policy")


@dataclass(frozen=True, slots=True)
class TurnPoint:
    """All episodes at one turn, counted from 1.

    delta: mean over the episodes of the policy's mean log-probability of a gold token less the full cache's, in nats a
    token; below 0 is a loss. agreement: share of the gold tokens, 0 to 1. kept_accuracy: of the episodes that the full
    cache answers rightly here, the share that the policy answers rightly too; None where there is none.
    """

    turn: int
    episodes: int
    delta: float
    agreement: float
    kept_accuracy: float | None


@dataclass(frozen=True, slots=True)
class Regret:
    """Log-probability that the policy loses to the full cache, in nats a gold token; above 0 is a loss.

    first: mean over the first turns. later: mean over all turns after the first; None where there is none. Where later
    is above first, the policy was best for the question it was compressed for.
    """

    first: float
    later: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """A policy beside the full cache over some episodes.

    delta: mean over all turns of the policy's mean log-probability of a gold token less the full cache's, in nats a
    token; below 0 is a loss. worst: the lowest of them. agreement: share of all gold tokens at which both caches find
    the same token likeliest, 0 to 1. full_correct: turns that the full cache answers rightly, of `turns`.
    kept_accuracy: share of those that the policy answers rightly; None where there is none. curve: turn by turn.
    """

    turns: int
    delta: float
    worst: float
    agreement: float
    full_correct: int
    kept_accuracy: float | None
    curve: tuple[TurnPoint, ...]
    regret: Regret


Pair = tuple[TurnScore, TurnScore]


def summarise(episodes: Iterable[EpisodeScores]) -> Summary:
    """Sum up episodes, of one task or of many; they may have different numbers of turns. Every turn weighs the same.
    Raises ValueError for no episode."""
    rows = [list(zip(each.full, each.policy, strict=True)) for each in episodes]
    if not rows:
        raise ValueError("nothing was measured")
    longest = max(map(len, rows))
    columns = [[row[index] for row in rows if index < len(row)] for index in range(longest)]
    pairs = [pair for row in rows for pair in row]
    deltas = [find_delta(pair) for pair in pairs]
    later = [find_delta(pair) for column in columns[1:] for pair in column]
    return Summary(
        turns=len(pairs),
        delta=fmean(deltas),
        worst=min(deltas),
        agreement=find_agreement(pairs),
        full_correct=sum(full.correct for full, _ in pairs),
        kept_accuracy=find_kept_accuracy(pairs),
        curve=tuple(draw_point(turn, column) for turn, column in enumerate(columns, 1)),
        regret=Regret(-fmean(map(find_delta, columns[0])), -fmean(later) if later else None),
    )


def draw_point(turn: int, pairs: Sequence[Pair]) -> TurnPoint:
    delta = fmean(map(find_delta, pairs))
    return TurnPoint(turn, len(pairs), delta, find_agreement(pairs), find_kept_accuracy(pairs))


def find_delta(pair: Pair) -> float:
    """Nats a gold token by which the policy is above the full cache."""
    full, policy = pair
    return fmean(policy.logprobs) - fmean(full.logprobs)


def find_agreement(pairs: Sequence[Pair]) -> float:
    return fmean(agrees for _, policy in pairs for agrees in policy.agrees)


def find_kept_accuracy(pairs: Sequence[Pair]) -> float | None:
    kept = [policy.correct for full, policy in pairs if full.correct]
    return fmean(kept) if kept else None
