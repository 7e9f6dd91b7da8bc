"""What OpenAI's chat and completions have in common: what an answer says of itself, and how it is streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

import msgspec

from headrace.engine.deltas import Delta
from headrace.job.drafts import Draft
from headrace.server.answers import count_usage
from headrace.server.calls import Call
from headrace.server.errors import ApiError, describe_error
from headrace.server.exchange import Exchange
from headrace.server.service import name_fingerprint

ENCODER = msgspec.json.Encoder()
DONE = b"data: [DONE]\n\n"
ALIVE = b": alive\n\n"

Choice = dict[str, Any]


def take_stream(body: dict[str, Any]) -> tuple[bool, bool]:
    """Take `stream` out of a body: whether to stream, and, by `stream_options`, whether to end with the usage."""
    stream, options = body.pop("stream", None), body.get("stream_options")
    if stream is not None and not isinstance(stream, bool):
        raise ApiError(400, "invalid_value", "stream must be true or false", "stream")
    if options is not None and (not isinstance(options, dict) or not stream):
        raise ApiError(400, "invalid_value", "stream_options must be an object, and needs stream", "stream_options")
    usage = (options or {}).get("include_usage")
    if usage is not None and not isinstance(usage, bool):
        raise ApiError(400, "invalid_value", "stream_options.include_usage must be true or false", "stream_options")
    return bool(stream), bool(usage)


def describe(call: Call, name: str, kind: str, draft: Draft, **values: Any) -> dict[str, Any]:
    """What every answer and chunk says, and `values`."""
    body = {"id": name, "object": kind, "created": call.created, "model": call.model}
    body |= {"system_fingerprint": name_fingerprint(call.llm), **values}
    if "service_tier" in call.body:
        body["service_tier"] = "default" if call.body["service_tier"] == "auto" else call.body["service_tier"]
    return body | ({"warnings": list(draft.warnings)} if draft.warnings else {})


async def stream_chunks(
    call: Call,
    exchange: Exchange,
    describe_chunk: Callable[..., dict[str, Any]],
    first: Iterable[Choice],
    read: Callable[[Delta], Iterable[Choice]],
    with_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """The events of an answer: `first`, what `read` makes of each delta, and at the end the usage where it is wanted.

    `describe_chunk` puts choices and usage into a chunk. Streams that end with the usage say in every chunk that it is
    null.
    """

    def event(choices: list[Choice], usage: dict[str, Any] | None = None) -> bytes:
        return encode_event(describe_chunk(choices=choices, **({"usage": usage} if with_usage else {})))

    try:
        for choice in first:
            yield event([choice])
        async for deltas in call.follow(exchange):
            for delta in deltas:
                for choice in read(delta):
                    yield event([choice])
            if not deltas:
                yield ALIVE
        if with_usage:
            yield event([], count_usage([await exchange.result()]))
    except ApiError as error:
        yield encode_event(describe_error(error))
    yield DONE


async def stream_whole(
    describe_chunk: Callable[..., dict[str, Any]], choices: list[Choice], usage: dict[str, Any] | None
) -> AsyncGenerator[bytes, None]:
    """The events of an answer that is all there already, and of its usage unless that is None."""
    yield encode_event(describe_chunk(choices=choices, **({} if usage is None else {"usage": None})))
    if usage is not None:
        yield encode_event(describe_chunk(choices=[], usage=usage))
    yield DONE


def encode_event(body: dict[str, Any]) -> bytes:
    return b"data: " + ENCODER.encode(body) + b"\n\n"
