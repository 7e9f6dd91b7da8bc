"""`POST /v1/messages` and `/v1/messages/count_tokens`, as Anthropic's clients know them.

Knows no field and no event: a body becomes one of /v1/chat/completions, and its answer is said in Anthropic's form.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from headrace.core import RowError
from headrace.job.drafts import Draft
from headrace.job.openai import CHAT
from headrace.server.calls import Call, answer, open_call
from headrace.server.errors import ApiError, describe_error, from_row_error
from headrace.server.exchange import Exchange
from headrace.server.message_body import read_message_body
from headrace.server.message_events import PING, MessageWriter, count_tokens, describe_stop, describe_usage
from headrace.server.projections import Asked, encode_event, make_delta
from headrace.server.replies import ReplyReader
from headrace.server.service import make_id
from headrace.server.streams import EventStream


def message_routes() -> list[Route]:
    return [
        Route("/v1/messages", create_message, methods=["POST"]),
        Route("/v1/messages/count_tokens", count_message_tokens, methods=["POST"]),
    ]


async def create_message(http: HttpRequest) -> Response:
    call = await open_call(http)
    asked = understand(call)
    draft, request = await call.understand(CHAT, asked.body, make_id("msg_"))
    if asked.stream:
        (exchange,) = call.begin([request])
        await call.start(exchange)
        return EventStream(stream_message(call, exchange, draft, asked), call.drop)
    (output,) = await call.collect([request])
    writer = MessageWriter(request.id)
    for event in ReplyReader(draft.format).read(make_delta(output.outputs[0])):
        list(writer.write(event))
    list(writer.close())
    stop, usage = describe_stop(output, writer.calls), count_tokens(output)
    return answer(describe_message(call, request.id, asked, content=writer.content, usage=usage, **stop))


async def count_message_tokens(http: HttpRequest) -> Response:
    """How many tokens a body's prompt has, also where they are somewhat more than the context holds."""
    call = await open_call(http)
    asked = understand(call, counting=True)
    try:
        _, tokens = await run_in_threadpool(call.encode_chat, asked.body)
    except RowError as error:
        raise from_row_error(error) from None
    return answer({"input_tokens": len(tokens)})


def understand(call: Call, counting: bool = False) -> Asked:
    try:
        return read_message_body(call.body, call.service.options.unknown_fields, counting)
    except RowError as error:
        raise from_row_error(error) from None


def describe_message(call: Call, name: str, asked: Asked, **values: Any) -> dict[str, Any]:
    """A message, whole or at its beginning."""
    body = {"id": name, "type": "message", "role": "assistant", "model": call.model, **values}
    return body | ({"warnings": list(asked.warnings)} if asked.warnings else {})


async def stream_message(call: Call, exchange: Exchange, draft: Draft, asked: Asked) -> AsyncGenerator[bytes, None]:
    request = exchange.request
    writer, reader = MessageWriter(request.id), ReplyReader(draft.format)
    # How much of the prompt was cached is known at the end.
    usage = describe_usage(len(request.prompt_token_ids), 0, 0)
    start = describe_message(call, request.id, asked, content=[], stop_reason=None, stop_sequence=None, usage=usage)
    try:
        yield encode_event({"type": "message_start", "message": start})
        async for deltas in call.follow(exchange):
            for delta in deltas:
                for event in reader.read(delta):
                    for each in writer.write(event):
                        yield encode_event(each)
            if not deltas:
                yield encode_event(PING)
        for each in writer.close():
            yield encode_event(each)
        output = await exchange.result()
        stop = describe_stop(output, writer.calls)
        yield encode_event({"type": "message_delta", "delta": stop, "usage": count_tokens(output)})
        yield encode_event({"type": "message_stop"})
    except ApiError as error:
        yield encode_event(describe_error(error, anthropic=True))
