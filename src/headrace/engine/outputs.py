"""What the engine answers: the public result types, shaped as vLLM users know them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headrace.core import RowError

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log probability and the likeliest alternatives as (token id, log probability), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class CompletionOutput:
    """One continuation. `finish_reason` is None while it is still growing."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request's answer: its prompt, its outputs by index; for scoring the prompt's log probabilities, of which the
    first token has none; for embedding a vector of length 1. `cached_tokens` of the prompt were found in the cache."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    error: RowError | None = None
    embedding: list[float] | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """Log probabilities of a text's tokens (natural logarithm; the first token has none) and exp(-their mean)."""

    text: str
    token_ids: list[int]
    logprobs: list[float | None]
    perplexity: float
