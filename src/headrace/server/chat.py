"""`POST /v1/chat/completions`. Knows the form of its answers; what fields mean, `job.openai` knows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from headrace.engine.deltas import Delta
from headrace.job.bodies import call_id, chat_choice, chat_logprobs
from headrace.job.openai import CHAT
from headrace.job.records import make_answer, spell_logprobs
from headrace.job.tool_stream import CallStarted, Event, Text
from headrace.server.answers import count_usage
from headrace.server.calls import Call, answer, open_call
from headrace.server.chunks import describe, stream_chunks, take_stream
from headrace.server.replies import ReplyReader
from headrace.server.service import make_id
from headrace.server.streams import EventStream


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
    readers = [ReplyReader(draft.format) for _ in range(request.params.n)]
    events = stream_chunks(
        call,
        exchange,
        partial(describe, call, name, "chat.completion.chunk", draft),
        [chunk_choice(index, {"role": "assistant", "content": "", "refusal": None}) for index in range(len(readers))],
        lambda delta: chat_chunks(call, name, delta, readers[delta.index]),
        with_usage,
    )
    return EventStream(events, call.drop)


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
