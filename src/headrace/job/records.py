"""What the journal keeps of a row, and how an engine's answer becomes it. Knows no file and no output format."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from enum import IntFlag

import msgspec
import numpy as np

from headrace.core import RowError
from headrace.engine.outputs import CompletionOutput, RequestOutput, TokenLogprob
from headrace.job.embeddings import Vector, cut, pack, unpack
from headrace.job.tool_formats import ToolFormat

Decode = Callable[[int], bytes]


class Token(msgspec.Struct, array_like=True, frozen=True):
    """One output token, its text in UTF-8, with its log probability and the likeliest alternatives, best first."""

    data: bytes
    logprob: float
    top: list[tuple[bytes, float]] = []


class Call(msgspec.Struct, array_like=True, frozen=True):
    """A call of a tool; `arguments` is JSON text as the model wrote it."""

    name: str
    arguments: str


class Choice(msgspec.Struct, array_like=True, frozen=True):
    """One continuation of a row. Calls of tools are not in its text."""

    text: str
    finish_reason: str
    tokens: int
    stop_reason: str | int | None = None
    logprobs: list[Token] | None = None
    calls: list[Call] = []


class Failure(msgspec.Struct, array_like=True, frozen=True):
    """Why a row has no answer."""

    code: str
    message: str


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """The part of a record that identical rows share. `embedding` is a whole vector, little-endian float32."""

    prompt_tokens: int = 0
    choices: list[Choice] = []
    error: Failure | None = None
    embedding: bytes | None = None

    @property
    def output_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)


class Record(msgspec.Struct, array_like=True, frozen=True):
    """One finished row. `line` is from 1; `url` and `model` are an OpenAI Batch row's own; `prefix` is echoed text;
    `dimensions` and `as_text` say how its vector is wanted."""

    id: str
    line: int
    answer: Answer
    created: int = 0
    url: str = ""
    model: str | None = None
    warnings: list[str] = []
    prefix: str = ""
    shortened: bool = False
    dimensions: int | None = None
    as_text: bool = False

    @property
    def vector(self) -> Vector | None:
        """What the row wanted of its vector, of length 1."""
        data = self.answer.embedding
        return None if data is None else cut(unpack(data), self.dimensions)


class Traits(IntFlag):
    """What a record holds beyond a plain answer, so that writers know their columns without reading every record."""

    LOGPROBS = 1
    WARNINGS = 2
    CHOICES = 4
    SHORTENED = 8
    EMBEDDINGS = 16
    TEXTS = 32


def find_traits(record: Record) -> Traits:
    traits = Traits(0)
    if any(choice.logprobs is not None for choice in record.answer.choices):
        traits |= Traits.LOGPROBS
    if record.warnings:
        traits |= Traits.WARNINGS
    if len(record.answer.choices) > 1:
        traits |= Traits.CHOICES
    if record.answer.embedding is not None:
        traits |= Traits.EMBEDDINGS
    if record.answer.choices:
        traits |= Traits.TEXTS
    return traits | (Traits.SHORTENED if record.shortened else Traits(0))


def failed(error: RowError, prompt_tokens: int = 0) -> Answer:
    return Answer(prompt_tokens, [], Failure(error.code, str(error)))


def make_answer(output: RequestOutput, decode: Decode, form: ToolFormat | None = None) -> Answer:
    """The engine's answer with token ids turned into text, for the tokenizer is not there when files are written.

    `form` is how the answer may call tools.
    """
    if output.error is not None:
        return failed(output.error, len(output.prompt_token_ids))
    if output.embedding is not None:
        vector = pack(np.array(output.embedding, dtype=np.float32))
        return Answer(len(output.prompt_token_ids), embedding=vector)
    choices = [make_choice(each, decode, form) for each in output.outputs]
    return Answer(len(output.prompt_token_ids), choices)


def make_choice(output: CompletionOutput, decode: Decode, form: ToolFormat | None) -> Choice:
    text, calls = (output.text, []) if form is None else form.parse(output.text)
    return Choice(
        text=text,
        finish_reason=output.finish_reason or "abort",
        tokens=len(output.token_ids),
        stop_reason=output.stop_reason,
        logprobs=None if output.logprobs is None else spell_logprobs(output.logprobs, decode),
        calls=[Call(call.name, call.arguments) for call in calls],
    )


def spell_logprobs(logprobs: Iterable[TokenLogprob], decode: Decode) -> list[Token]:
    return [
        Token(decode(each.token_id), each.logprob, [(decode(token), value) for token, value in each.top])
        for each in logprobs
    ]


def now() -> int:
    return int(time.time())
