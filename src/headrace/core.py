"""The vocabulary that every room shares: requests, sequences, step plans, errors.

This module depends on nothing but the standard library and knows nothing of tensors, files or models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableSequence
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Literal

ConstraintKind = Literal["json", "regex", "choice", "grammar"]
Pooling = Literal["mean", "last"]


class HeadraceError(Exception):
    """Base of every error that Headrace raises on purpose: one clear line, and the exit code it ends with."""

    exit_code = 1


class ModelError(HeadraceError):
    """The model cannot be used: unsupported, truncated, wrong hash, tensor missing. Says what and where."""

    exit_code = 2


class InputError(HeadraceError, ValueError):
    """A setting, a flag or an input file is wrong as a whole. Says what, where and what to do."""

    exit_code = 2


class RowError(HeadraceError):
    """One row cannot be answered. `code` is a stable word for machines; the message is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an output must match: a JSON schema (text), a regular expression, a JSON list of choices, a Lark grammar."""

    kind: ConstraintKind
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt; names and meanings as OpenAI's API and vLLM have them.

    Greedy unless `temperature` is above 0. `top_k=0` and `top_p=1` switch those filters off.
    `logprobs=k` records each token's log probability and the k likeliest alternatives.
    Raises ValueError, saying what would be right, for a value out of range.
    """

    n: int = 1
    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        check_range("n", self.n, 1, 128, whole=True)
        check_range("max_tokens", self.max_tokens, 1, whole=True)
        check_range("min_tokens", self.min_tokens, 0, self.max_tokens, whole=True)
        check_range("temperature", self.temperature, 0, 100)
        check_range("top_p", self.top_p, 1e-9, 1)
        check_range("top_k", self.top_k, -1, whole=True)
        check_range("min_p", self.min_p, 0, 1)
        check_range("presence_penalty", self.presence_penalty, -2, 2)
        check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        check_range("repetition_penalty", self.repetition_penalty, 1e-3, 100)
        check_range("logprobs", self.logprobs or 0, 0, 20, whole=True)
        if not all(isinstance(text, str) and text for text in self.stop) or len(self.stop) > 16:
            raise ValueError(f"stop must be at most 16 non-empty strings, got {self.stop!r}")
        for token in (*self.logit_bias, *self.stop_token_ids):
            check_range("each token id of logit_bias and stop_token_ids", token, 0, whole=True)
        for token, bias in self.logit_bias.items():
            check_range(f"logit_bias[{token}]", bias, -100, 100)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def check_range(name: str, value: object, low: float, high: float = math.inf, whole: bool = False) -> None:
    """Raise ValueError naming the allowed range unless low <= value <= high (and value is whole where asked)."""
    kind = "a whole number" if whole else "a number"
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not (low <= value <= high):  # type: ignore[operator]
        limit = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise ValueError(f"{name} must be {kind} {limit}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt as token ids, and how to continue it. `id` also seeds its randomness, unless `params.seed` does.

    `score` asks for the log probability of each prompt token, `embed` for one vector of its text: nothing is generated.
    A server's requests say more: lower `priority` goes first; `background` work is for the time when there is no
    other, and for a small share of the rest; turns of one `program` (a conversation) follow each other; prefixes are
    shared within one `owner` only.
    """

    id: str
    prompt_token_ids: Rows[int]
    params: SamplingParams
    score: bool = False
    embed: Pooling | None = None
    priority: int = 0
    background: bool = False
    program: str = ""
    owner: str = ""

    @property
    def generates(self) -> bool:
        """Whether it asks for output tokens; else only its prompt is computed."""
        return not self.score and self.embed is None


@dataclass(slots=True, eq=False)
class Sequence:
    """One of a request's `n` continuations while it is in the engine.

    There is no prefill and no decode phase: `tokens` are known, the first `computed` of them have their KV in the
    cache, and each step computes some more. They are the request's until it is admitted, its own from then on. `tables`
    (block ids by cache group, -1 where a sliding window has freed the block) is owned by the cache's bookkeeping; the
    engine only reads it. So are the first `dropped` blocks, gone since a policy made the sequence smaller: what it kept
    has moved to those that follow.
    """

    request: Request
    index: int
    number: int
    tokens: MutableSequence[int]
    computed: int = 0
    tables: list[list[int]] = field(default_factory=list)
    cached_tokens: int = 0
    preemptions: int = 0
    dropped: int = 0

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def max_length(self) -> int:
        """Tokens that this sequence can ever hold in the cache."""
        return self.prompt_length + (self.request.params.max_tokens if self.request.generates else 0)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute `length` known tokens of the sequence with this number, from position `start` on."""

    sequence: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Admission:
    """A waiting sequence starts to run with its first `cached` tokens taken from the prefix tree."""

    sequence: int
    cached: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does, as data: admit, preempt, then compute the chunks. Sequences by number."""

    chunks: tuple[Chunk, ...] = ()
    admit: tuple[Admission, ...] = ()
    preempt: tuple[int, ...] = ()
