"""`POST /v1/embeddings`: a vector of length 1 for each text, pooled as the model's own configuration says."""

from __future__ import annotations

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from headrace.core import Request, RowError, SamplingParams
from headrace.job.embeddings import Embedder, EmbeddingFormat, describe_vector, read_asked
from headrace.job.fields import Fields
from headrace.server.answers import count_usage
from headrace.server.calls import Call, answer, open_call
from headrace.server.errors import from_row_error
from headrace.server.projections import judge
from headrace.server.service import make_id


async def create_embeddings(http: HttpRequest) -> Response:
    call = await open_call(http)
    try:
        requests, form, warnings = await run_in_threadpool(read_body, call)
    except RowError as error:
        raise from_row_error(error) from None
    outputs = await call.collect(requests)
    data = [
        describe_vector(np.array(each.embedding, dtype=np.float32), form, index) for index, each in enumerate(outputs)
    ]
    usage = count_usage(outputs)
    usage = {name: usage[name] for name in ("prompt_tokens", "total_tokens")}
    body = {"object": "list", "data": data, "model": call.model, "usage": usage}
    return answer(body | ({"warnings": list(warnings)} if warnings else {}))


def read_body(call: Call) -> tuple[list[Request], EmbeddingFormat, tuple[str, ...]]:
    """One request an input, the form of their vectors, and warnings. Raises RowError, naming the field."""
    fields, llm = Fields(call.body, ""), call.llm
    embedder = Embedder(llm.pooling, llm.engine.model.config.hidden_size)
    inputs, form = read_asked(fields, embedder)
    warnings = judge(fields, call.service.options.unknown_fields)
    for each in inputs:
        if isinstance(each, str):
            llm.tokenizer.refuse_longer(each, llm.context_length)
    tokens = [llm.tokenizer.encode(each) if isinstance(each, str) else each for each in inputs]
    params, name = SamplingParams(max_tokens=1), make_id("embd-")
    requests = [
        Request(f"{name}-{index}", tuple(each), params, embed=embedder.pooling, owner=call.owner)
        for index, each in enumerate(tokens)
    ]
    return requests, form, warnings
