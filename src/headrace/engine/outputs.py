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
    """A request's answer: its prompt, its outputs by index, and for scoring the prompt's log probabilities."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[float | None] | None = None
    error: RowError | None = None
