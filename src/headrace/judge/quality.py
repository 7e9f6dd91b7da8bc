"""Perplexity of a text, and how near one number format comes to another on it.

Texts are cut into windows that know nothing of each other; every token of a window but its first counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.checkpoint import Tokenizer
from headrace.core import InputError
from headrace.engine.forward import compute_hidden
from headrace.model import Model

# Tokens whose logits are held at once.
LOGIT_ROWS = 128
WINDOWS_AT_ONCE = 4

Tell = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log probability (natural logarithm) of `tokens` tokens."""

    perplexity: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """One model beside another on the same text: the share of tokens after which both find the same next token
    likeliest, the mean KL divergence of the next token's distribution (nats, other from one), and both perplexities."""

    top1: float
    kl: float
    perplexity: float
    other_perplexity: float
    tokens: int


def find_begin(tokenizer: Tokenizer) -> list[int]:
    """What the model wants before any text: its begin token, or nothing."""
    whole, alone = tokenizer.encode("a"), tokenizer.encode("a", special=False)
    return whole[: next(start for start in range(len(whole)) if whole[start : start + len(alone)] == alone)]


def cut_text(text: str, tokenizer: Tokenizer, window: int, most: int) -> list[list[int]]:
    """Whole windows of the first `most` tokens of a text. Raises InputError for tokens that fill none."""
    return cut_windows(tokenizer.encode(text, special=False), window, most, find_begin(tokenizer))


def cut_windows(tokens: list[int], window: int, most: int, begin: Sequence[int] = ()) -> list[list[int]]:
    """Whole windows of the first `most` tokens, each with `begin` before its own: a model that knows texts with a begin
    token alone says little of one without. Raises InputError for tokens that fill none."""
    own = window - len(begin)
    if own < 2:
        raise InputError(f"a window of {window} tokens predicts nothing: use {2 + len(begin)} or more")
    starts = range(0, min(len(tokens), most) - own + 1, own)
    windows = [[*begin, *tokens[start : start + own]] for start in starts]
    if not windows and most < len(tokens):
        raise InputError(
            f"--tokens: the first {most} of the text's {len(tokens)} tokens are fewer than a window of {window}: raise "
            "--tokens or lower --window"
        )
    if not windows:
        raise InputError(f"the text has {len(tokens)} tokens, fewer than a window of {window}")
    return windows


def measure_perplexity(model: Model, windows: list[list[int]], tell: Tell) -> Perplexity:
    """Perplexity of windows; tell hears how many of how many are done."""
    total, count = 0.0, 0
    for group, tokens in take_groups(windows, tell):
        hidden = compute_hidden(model, group)
        for rows, targets in slice_rows(group, tokens):
            logprobs = model.logits(hidden[rows]).log_softmax(-1)
            total -= float(logprobs.gather(1, targets[:, None]).double().sum())
            count += len(rows)
    return Perplexity(math.exp(total / count), count)


def measure_agreement(one: Model, other: Model, windows: list[list[int]], tell: Tell) -> Agreement:
    """How near `other` comes to `one`. Both must have the same vocabulary."""
    same = kl = total = other_total = 0.0
    count = 0
    for group, tokens in take_groups(windows, tell):
        hidden, other_hidden = (compute_hidden(model, group) for model in (one, other))
        for rows, targets in slice_rows(group, tokens):
            first = one.logits(hidden[rows]).log_softmax(-1)
            second = other.logits(other_hidden[rows]).log_softmax(-1)
            same += int((first.argmax(-1) == second.argmax(-1)).sum())
            kl += float((first.exp() * (first - second)).sum())
            total -= float(first.gather(1, targets[:, None]).double().sum())
            other_total -= float(second.gather(1, targets[:, None]).double().sum())
            count += len(rows)
    return Agreement(same / count, kl / count, math.exp(total / count), math.exp(other_total / count), count)


def take_groups(windows: list[list[int]], tell: Tell) -> Iterator[tuple[list[list[int]], Tensor]]:
    for start in range(0, len(windows), WINDOWS_AT_ONCE):
        group = windows[start : start + WINDOWS_AT_ONCE]
        yield group, torch.tensor([token for window in group for token in window])
        tell(min(start + WINDOWS_AT_ONCE, len(windows)), len(windows))


def slice_rows(group: list[list[int]], tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows that predict, some at a time, and the tokens that follow them."""
    lengths = torch.tensor([len(window) for window in group])
    predicts = torch.ones(len(tokens), dtype=torch.bool)
    predicts[lengths.cumsum(0) - 1] = False
    for rows in torch.split(predicts.nonzero().flatten(), LOGIT_ROWS):
        yield rows, tokens[rows + 1]
