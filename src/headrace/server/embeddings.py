"""`POST /v1/embeddings`: a vector of length 1 for each text, pooled as the model's own configuration says."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from headrace.core import Request, RowError, SamplingParams
from headrace.job.fields import Fields
from headrace.server.answers import count_usage
from headrace.server.calls import Call, answer, open_call
from headrace.server.errors import ApiError, from_row_error
from headrace.server.service import make_id

MOST_INPUTS = 2048


async def create_embeddings(http: HttpRequest) -> Response:
    call = await open_call(http)
    try:
        requests, as_text, size = await run_in_threadpool(read_body, call)
    except RowError as error:
        raise from_row_error(error) from None
    outputs = await call.collect(requests)
    vectors = [cut(each.embedding or [], size) for each in outputs]
    data = [
        {"object": "embedding", "index": index, "embedding": encode(vector) if as_text else vector.tolist()}
        for index, vector in enumerate(vectors)
    ]
    usage = count_usage(outputs)
    usage = {name: usage[name] for name in ("prompt_tokens", "total_tokens")}
    return answer({"object": "list", "data": data, "model": call.model, "usage": usage})


def read_body(call: Call) -> tuple[list[Request], bool, int | None]:
    """One request an input; whether vectors go out as base64 text; how many numbers of each are wanted.

    Raises RowError, naming the field.
    """
    fields = Fields(call.body, "")
    for name in ("model", "user"):
        fields.take(name)
    inputs = read_inputs(fields.take("input"))
    form = fields.text("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise RowError("invalid_value", f"encoding_format must be float or base64, got {form!r:.40}")
    most = call.llm.engine.model.config.hidden_size
    size = fields.whole("dimensions", 1, most)
    if fields.left() and call.service.options.unknown_fields == "error":
        raise RowError("unknown_field", f"{', '.join(fields.left())}: not supported; take it out")
    tokenizer, pooling, name = call.llm.tokenizer, call.llm.pooling, make_id("embd-")
    for each in inputs:
        if isinstance(each, str):
            tokenizer.refuse_longer(each, call.llm.context_length)
    tokens = [tokenizer.encode(each) if isinstance(each, str) else each for each in inputs]
    params = SamplingParams(max_tokens=1)
    return (
        [
            Request(f"{name}-{index}", tuple(each), params, embed=pooling, owner=call.owner)
            for index, each in enumerate(tokens)
        ],
        form == "base64",
        size,
    )


def read_inputs(value: Any) -> list[str | list[int]]:
    """The four shapes of `input`: a text, texts, token ids, lists of token ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowError("invalid_value", "input must be a text, a list of texts, or token ids")
    if len(value) > MOST_INPUTS:
        raise ApiError(400, "invalid_value", f"input holds more than {MOST_INPUTS} texts", "input")
    for place, each in enumerate(value):
        right = isinstance(each, str) or (isinstance(each, list) and all(type(token) is int for token in each))
        if not right or not each:
            raise RowError("invalid_value", f"input[{place}] must be a text or token ids, and not empty")
    return value


def cut(vector: list[float], size: int | None) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The first `size` numbers of a vector, at length 1 again."""
    found = np.array(vector, dtype=np.float32)[:size]
    length = float(np.linalg.norm(found))
    return found / length if length else found


def encode(vector: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    """Little-endian float32 in base64, as OpenAI sends it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
