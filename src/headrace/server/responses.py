"""`POST /v1/responses`, as OpenAI's clients know it. Nothing is stored: every request brings its whole conversation.

Knows no field and no event: a body becomes one of /v1/chat/completions, and its answer is said in the newer form.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from headrace.core import Request, RowError
from headrace.engine.deltas import Delta
from headrace.job.bodies import chat_token
from headrace.job.drafts import Draft
from headrace.job.openai import CHAT
from headrace.job.records import spell_logprobs
from headrace.server.calls import Call, answer, open_call
from headrace.server.chunks import ALIVE
from headrace.server.errors import ApiError, from_row_error
from headrace.server.exchange import Exchange
from headrace.server.projections import Asked, encode_event, make_delta
from headrace.server.replies import ReplyReader
from headrace.server.response_body import read_response_body
from headrace.server.response_events import Body, ResponseWriter, describe_end
from headrace.server.service import make_id
from headrace.server.streams import EventStream

# Settings that an answer repeats as they were given; null where they were not.
REPEATED = (
    "instructions", "max_output_tokens", "max_tool_calls", "prompt_cache_key", "safety_identifier", "user",
)  # fmt: skip


def response_routes() -> list[Route]:
    return [Route("/v1/responses", create_response, methods=["POST"])]


async def create_response(http: HttpRequest) -> Response:
    call = await open_call(http)
    try:
        asked = read_response_body(call.body, call.service.options.unknown_fields)
    except RowError as error:
        raise from_row_error(error) from None
    draft, request = await call.understand(CHAT, asked.body, make_id("resp_"))
    settings = describe_settings(call, request, asked)
    if asked.stream:
        (exchange,) = call.begin([request])
        await call.start(exchange)
        return EventStream(stream_response(call, exchange, draft, settings), call.drop)
    (output,) = await call.collect([request])
    writer = ResponseWriter(request.id)
    list(write_delta(call, make_delta(output.outputs[0]), ReplyReader(draft.format), writer))
    end = describe_end(output)
    list(writer.finish(end["status"] == "completed"))
    return answer(describe_response(settings, output=writer.output, **end))


def describe_settings(call: Call, request: Request, asked: Asked) -> Body:
    """What a response says from its beginning to its end."""
    body, params = call.body, request.params
    parallel, tier = body.get("parallel_tool_calls"), body.get("service_tier")
    settings = {"id": request.id, "object": "response", "created_at": call.created, "model": call.model}
    settings |= {name: body.get(name) for name in REPEATED}
    settings |= {
        "background": False,
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": True if parallel is None else parallel,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": params.temperature,
        "text": {"format": (body.get("text") or {}).get("format") or {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": [
            {"parameters": None, "strict": False, "description": None} | tool for tool in body.get("tools") or []
        ],
        "top_logprobs": params.logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
    }
    if tier is not None:
        settings["service_tier"] = "default" if tier == "auto" else tier
    return settings | ({"warnings": list(asked.warnings)} if asked.warnings else {})


def describe_response(settings: Body, status: str, output: list[Body], **values: Any) -> Body:
    """A response in a certain state."""
    ended = int(time.time()) if status == "completed" else None
    found = {"error": None, "incomplete_details": None, "usage": None, "completed_at": ended}
    return settings | {"status": status, "output": output} | found | values


def write_delta(call: Call, delta: Delta, reader: ReplyReader, writer: ResponseWriter) -> Iterator[Body]:
    """The events of a delta: its text with log probabilities, or its calls."""
    if delta.logprobs is not None:
        writer.logprobs += [chat_token(token) for token in spell_logprobs(delta.logprobs, call.llm.token_bytes)]
    for event in reader.read(delta):
        yield from writer.write(event)


async def stream_response(call: Call, exchange: Exchange, draft: Draft, settings: Body) -> AsyncGenerator[bytes, None]:
    writer, reader = ResponseWriter(exchange.request.id), ReplyReader(draft.format)

    def tell(kind: str, **values: Any) -> bytes:
        return encode_event(writer.tell(kind, response=describe_response(settings, output=writer.output, **values)))

    try:
        yield tell("created", status="in_progress")
        yield tell("in_progress", status="in_progress")
        async for deltas in call.follow(exchange):
            for delta in deltas:
                for event in write_delta(call, delta, reader, writer):
                    yield encode_event(event)
            if not deltas:
                yield ALIVE
        end = describe_end(await exchange.result())
        for event in writer.finish(end["status"] == "completed"):
            yield encode_event(event)
        yield tell(end["status"], **end)
    except ApiError as error:
        yield tell("failed", status="failed", error={"code": "server_error", "message": str(error)})
