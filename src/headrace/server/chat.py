"""`POST /v1/chat/completions`. Knows the form of its answers; what fields mean, `job.openai` knows."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from headrace.core import Request
from headrace.engine.deltas import Delta
from headrace.job.bodies import call_id, chat_choice, chat_logprobs
from headrace.job.drafts import Draft
from headrace.job.openai import CHAT
from headrace.job.records import make_answer, spell_logprobs
from headrace.job.tool_stream import CallStarted, Event, Text
from headrace.server.answers import count_usage
from headrace.server.calls import Call, answer, open_call
from headrace.server.errors import ApiError, describe_error
from headrace.server.exchange import Exchange
from headrace.server.replies import ReplyReader
from headrace.server.service import make_id, name_fingerprint
from headrace.server.streams import EventStream

ENCODER = msgspec.json.Encoder()
DONE = b"data: [DONE]\n\n"
ALIVE = b": alive\n\n"


async def create_chat(http: HttpRequest) -> Response:
    call = await open_call(http)
    stream, with_usage = take_stream(call.body)
    name = make_id("chatcmpl-")
    draft, request = await call.understand(CHAT, call.body, name)
    if not stream:
        (output,) = await call.collect([request])
        reply = make_answer(output, call.llm.token_bytes, draft.format)
        choices = [chat_choice(index, choice, name) for index, choice in enumerate(reply.choices)]
        usage = count_usage([output])
        return answer(describe(call, name, "chat.completion", draft, choices=choices, usage=usage))
    (exchange,) = call.begin([request])
    await call.start(exchange)
    return EventStream(stream_chat(call, exchange, draft, request, with_usage), call.drop)


def take_stream(body: dict[str, Any]) -> tuple[bool, bool]:
    """Take `stream` and `stream_options` out of a body: whether to stream, and whether to end with the usage."""
    stream, options = body.pop("stream", None), body.pop("stream_options", None)
    if stream is not None and not isinstance(stream, bool):
        raise ApiError(400, "invalid_value", "stream must be true or false", "stream")
    if options is not None and (not isinstance(options, dict) or not stream):
        raise ApiError(400, "invalid_value", "stream_options must be an object, and needs stream", "stream_options")
    usage = (options or {}).get("include_usage", False)
    if not isinstance(usage, bool):
        raise ApiError(400, "invalid_value", "stream_options.include_usage must be true or false", "stream_options")
    return bool(stream), usage


def describe(call: Call, name: str, kind: str, draft: Draft, **values: Any) -> dict[str, Any]:
    """What every answer and chunk says, and `values`."""
    body = {"id": name, "object": kind, "created": call.created, "model": call.model}
    body |= {"system_fingerprint": name_fingerprint(call.llm), **values}
    if "service_tier" in call.body:
        body["service_tier"] = "default" if call.body["service_tier"] == "auto" else call.body["service_tier"]
    return body | ({"warnings": list(draft.warnings)} if draft.warnings else {})


async def stream_chat(
    call: Call, exchange: Exchange, draft: Draft, request: Request, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    def event(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        extra = {"usage": usage} if with_usage else {}
        return encode_event(describe(call, request.id, "chat.completion.chunk", draft, choices=choices, **extra))

    readers = [ReplyReader(draft.format) for _ in range(request.params.n)]
    try:
        for index in range(request.params.n):
            yield event([chunk_choice(index, {"role": "assistant", "content": "", "refusal": None})])
        async for deltas in call.follow(exchange):
            for delta in deltas:
                for choice in chat_chunks(call, request.id, delta, readers[delta.index]):
                    yield event([choice])
            if not deltas:
                yield ALIVE
        if with_usage:
            yield event([], count_usage([await exchange.result()]))
    except ApiError as error:
        yield encode_event(describe_error(error))
    yield DONE


def chat_chunks(call: Call, name: str, delta: Delta, reader: ReplyReader) -> Iterator[dict[str, Any]]:
    """A delta as choices: its text or its calls, log probabilities with the first of them, and why it ended."""
    logprobs = None
    if delta.logprobs is not None:
        logprobs = chat_logprobs(spell_logprobs(delta.logprobs, call.llm.token_bytes))
    for event in reader.read(delta):
        yield chunk_choice(delta.index, describe_event(event, name, delta.index), logprobs)
        logprobs = None
    if logprobs is not None:
        yield chunk_choice(delta.index, {"content": ""}, logprobs)
    if delta.finish_reason is not None:
        yield chunk_choice(delta.index, {}, None, reader.finish_reason(delta))


def describe_event(event: Event, name: str, index: int) -> dict[str, Any]:
    """What a choice of the answer called `name` has gained."""
    if isinstance(event, Text):
        return {"content": event.text}
    if isinstance(event, CallStarted):
        function = {"name": event.name, "arguments": ""}
        call = {"index": event.index, "id": call_id(name, index, event.index), "type": "function", "function": function}
        return {"tool_calls": [call]}
    return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}


def chunk_choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def encode_event(body: dict[str, Any]) -> bytes:
    return b"data: " + ENCODER.encode(body) + b"\n\n"
