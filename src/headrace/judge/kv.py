"""What a KV policy costs in quality and takes in memory and time, beside the plain cache on the same text.

A window is a context and the tokens after it. The context is computed at once; then the tokens that follow are read
one a step, as if they were generated, and what each step predicts is compared. Knows no policy by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any, Literal, cast

import torch
from torch import Tensor

from headrace.cache.policies.base import KVPolicy, LayerStep
from headrace.cache.policies.choice import make_policy
from headrace.cache.policies.plain import Plain
from headrace.core import InputError
from headrace.judge.driver import TOKENS_AT_ONCE, CacheDriver, Tell
from headrace.judge.episodes import spread
from headrace.judge.quality import cut_windows
from headrace.meter.stopwatch import Stopwatch
from headrace.model import Model

# Tokens read after each context.
TAIL = 128

# `prefix`: the context is computed exactly and only then read from the policy's cache. `stream`: as the engine does it.
Way = Literal["prefix", "stream"]
WAYS: tuple[Way, ...] = ("prefix", "stream")


@dataclass(frozen=True, slots=True)
class Degradation:
    """What a policy loses to the plain cache.

    dnll   nats a token that the policy's mean negative log-probability is above the plain cache's
    error  standard error of dnll, from how much windows differ
    kl     mean KL divergence of the policy's next-token distribution from the plain one, nats
    top1   share of the tokens after which both find the same next token likeliest
    """

    dnll: float
    error: float
    kl: float
    top1: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """One policy at one length of context.

    bytes_per_token  of the cache's blocks that the context holds once it is computed, over its tokens
    attention_ns     of one query over all layers, nanoseconds a token of its context; median of the steps after it
    """

    kv: str
    context: int
    windows: int
    prefix: Degradation
    stream: Degradation
    bytes_per_token: float
    attention_ns: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What one pass over the windows gave: hidden states [windows, TAIL, hidden], and the cost."""

    hidden: Tensor
    bytes_per_token: float
    attention_ns: float


class WatchedPolicy:
    """Another policy, whose attention is timed, all that it does for it included."""

    def __init__(self, policy: KVPolicy, watch: Stopwatch) -> None:
        self._policy = policy
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def attend(self, step: LayerStep) -> Tensor:
        with self._watch.part("attention"):
            return self._policy.attend(step)


class KVJudge:
    """Policies on the same windows; the plain cache is read once for all of them."""

    def __init__(self, model: Model, windows: list[list[int]], block_size: int, tell: Tell) -> None:
        """windows: two or more, each a context and TAIL + 1 tokens after it."""
        self.model = model
        self.windows = windows
        self.context = len(windows[0]) - TAIL - 1
        self.block_size = block_size
        self.tell = tell
        self.plain = self.read(Plain, "stream", "plain, to compare with").hidden

    def judge(self, kv: str) -> Judgement:
        """Measure the policy of an expression. Raises InputError for one that cannot serve this model."""
        prefix, stream = (self.read(partial(make_policy, kv), way, kv) for way in WAYS)
        return Judgement(
            kv=kv,
            context=self.context,
            windows=len(self.windows),
            prefix=self.compare(prefix.hidden),
            stream=self.compare(stream.hidden),
            bytes_per_token=stream.bytes_per_token,
            # Both read the same cache a token a step: the quieter time counts.
            attention_ns=min(prefix.attention_ns, stream.attention_ns),
        )

    def read(self, make: Callable[[], KVPolicy], way: Way, name: str) -> Reading:
        """Read all windows through caches of a policy; `name` is what progress calls it."""
        hidden, sizes, times = [], [], []
        most = max(1, TOKENS_AT_ONCE // (self.context + TAIL))
        for start in range(0, len(self.windows), most):
            group = self.windows[start : start + most]
            watch = Stopwatch()
            watched = cast(KVPolicy, WatchedPolicy(make(), watch))
            driver = CacheDriver(self.model, watched, self.block_size, len(group), self.context + TAIL)
            opened = [(driver.start(window[: self.context]), window) for window in group]
            for place, (sequence, _) in enumerate(opened, start + 1):
                self.tell(f"{name}: {way}, context {place} of {len(self.windows)}")
                driver.read(sequence, exactly=way == "prefix")
            sizes.append(driver.used_bytes / len(group) / self.context)
            rows = []
            for offset in range(self.context, self.context + TAIL):
                self.tell(f"{name}: {way}, token {offset - self.context + 1} of {TAIL}")
                before = watch.seconds["attention"]
                rows.append(driver.feed([(sequence, window[offset : offset + 1]) for sequence, window in opened]))
                times.append((watch.seconds["attention"] - before) / len(group) / (offset + 1))
            hidden.append(torch.stack(rows, 1))
        return Reading(torch.cat(hidden), fmean(sizes), median(times) * 1e9)

    def compare(self, hidden: Tensor) -> Degradation:
        """Hidden states [windows, TAIL, hidden] beside the plain cache's."""
        deltas, divergences, agreements = [], [], []
        for window, mine, plain in zip(self.windows, hidden, self.plain, strict=True):
            targets = torch.tensor(window[-TAIL:], device=mine.device)[:, None]
            first, second = (self.model.logits(each).log_softmax(-1) for each in (plain, mine))
            deltas.append(float((first - second).gather(1, targets).double().mean()))
            divergences.append(float((first.exp() * (first - second)).sum(-1).double().mean()))
            agreements.append(float((first.argmax(-1) == second.argmax(-1)).double().mean()))
        # Not `stdev`, which fails on what is no number: a damaged model is to be shown as one.
        error = float(torch.tensor(deltas, dtype=torch.float64).std()) / len(deltas) ** 0.5
        return Degradation(fmean(deltas), error, fmean(divergences), fmean(agreements))

    def find_perplexity(self) -> float:
        """The plain cache's perplexity of the tokens that are compared."""
        total = 0.0
        for window, plain in zip(self.windows, self.plain, strict=True):
            targets = torch.tensor(window[-TAIL:], device=plain.device)[:, None]
            total -= float(self.model.logits(plain).log_softmax(-1).gather(1, targets).double().mean())
        return math.exp(total / len(self.windows))


def choose_windows(tokens: list[int], context: int, count: int, begin: Sequence[int] = ()) -> list[list[int]]:
    """`count` windows with contexts of so many tokens, `begin` and then the text's, spread over it. Raises InputError
    for a text that is short."""
    size = context + TAIL + 1
    if count < 2:
        raise InputError(f"{count} windows say nothing of how much windows differ: use 2 or more")
    needed = count * (size - len(begin))
    if len(tokens) < needed:
        raise InputError(
            f"the text has {len(tokens):,} tokens, and {count} windows of {size:,} need {needed:,}: give more "
            "text, or ask for fewer windows or shorter contexts"
        )
    windows = cut_windows(tokens, size, len(tokens), begin)
    return [windows[place] for place in spread(count, len(windows))]
