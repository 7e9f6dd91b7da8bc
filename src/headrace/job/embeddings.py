"""Bodies of /v1/embeddings: what they ask for, and vectors as they are sent. Knows no route, no file and no engine."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.checkpoint import open_checkpoint
from headrace.checkpoint.pooling import read_pooling
from headrace.core import Pooling, RowError
from headrace.job.fields import MOST_TOKENS, Fields
from headrace.model.loading import read_config

EMBEDDINGS = "/v1/embeddings"
MOST_INPUTS = 2048
Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Embedder:
    """How a model makes a vector of a text, and how many numbers it has."""

    pooling: Pooling
    size: int


@dataclass(frozen=True, slots=True)
class EmbeddingFormat:
    """What is wanted of a vector: its first `size` numbers, all for None, as numbers or as base64 text."""

    size: int | None = None
    as_text: bool = False


WHOLE = EmbeddingFormat()


def open_embedder(model: str) -> Embedder:
    """Reads configurations only. Raises ModelError for a model that cannot be had or pools in another way."""
    checkpoint = open_checkpoint(model)
    return Embedder(read_pooling(checkpoint.path), read_config(checkpoint.config).hidden_size)


def read_asked(fields: Fields, embedder: Embedder) -> tuple[list[str | list[int]], EmbeddingFormat]:
    """A body's texts or lists of token ids, and the form of their vectors. Raises RowError, naming the field."""
    for name in ("model", "user"):
        fields.take(name)
    inputs = read_inputs(fields.take("input"), fields.prefix)
    form = fields.text("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise RowError("invalid_value", f"{fields.prefix}encoding_format must be float or base64, got {form!r:.40}")
    return inputs, EmbeddingFormat(fields.whole("dimensions", 1, embedder.size), form == "base64")


def read_inputs(value: Any, prefix: str) -> list[str | list[int]]:
    """The four shapes of `input`: a text, texts, token ids, lists of token ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowError("invalid_value", f"{prefix}input must be a text, a list of texts, or token ids")
    if len(value) > MOST_INPUTS:
        raise RowError("invalid_value", f"{prefix}input holds more than {MOST_INPUTS} texts")
    for place, each in enumerate(value):
        if (not isinstance(each, str) and not is_tokens(each)) or not each:
            raise RowError("invalid_value", f"{prefix}input[{place}] must be a text or token ids, and not empty")
    return value


def is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < MOST_TOKENS for each in value)


def describe_vector(vector: Vector, form: EmbeddingFormat, index: int = 0) -> dict[str, Any]:
    """One entry of the answer's data."""
    found = cut(vector, form.size)
    return {"object": "embedding", "index": index, "embedding": encode(found) if form.as_text else found.tolist()}


def cut(vector: Vector, size: int | None) -> Vector:
    """The first `size` numbers of a vector of length 1, at length 1 again; the vector itself for None."""
    if size is None:
        return vector
    found = vector[:size]
    length = float(np.linalg.norm(found))
    return found / length if length else found


def encode(vector: Vector) -> str:
    """Little-endian float32 in base64, as OpenAI sends it."""
    return base64.b64encode(pack(vector)).decode()


def pack(vector: Vector) -> bytes:
    """Little-endian float32."""
    return vector.astype("<f4").tobytes()


def unpack(data: bytes) -> Vector:
    """What `pack` made."""
    return np.frombuffer(data, dtype="<f4")
