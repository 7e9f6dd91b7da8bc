"""Answers in the form of /v1/messages, whole or as events. Knows no body and no engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from headrace.engine.outputs import RequestOutput
from headrace.job.bodies import hash_id
from headrace.job.tool_stream import CallStarted, Event, Text

PING = {"type": "ping"}


class MessageWriter:
    """Writes the events of one answer, called `name`; `content` holds the blocks that they make."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.content: list[dict[str, Any]] = []
        self._open = False
        self._arguments = ""

    @property
    def calls(self) -> bool:
        """Whether the answer calls tools."""
        return any(block["type"] == "tool_use" for block in self.content)

    def write(self, event: Event) -> Iterator[dict[str, Any]]:
        """The events that tell of what the answer has gained."""
        if isinstance(event, Text):
            if not self._open or self.content[-1]["type"] != "text":
                yield from self._begin({"type": "text", "text": ""})
            self.content[-1]["text"] += event.text
            yield self._gain({"type": "text_delta", "text": event.text})
        elif isinstance(event, CallStarted):
            name = f"toolu_{hash_id(f'{self.name}/{event.index}')}"
            yield from self._begin({"type": "tool_use", "id": name, "name": event.name, "input": {}})
        else:
            self._arguments += event.text
            yield self._gain({"type": "input_json_delta", "partial_json": event.text})

    def close(self) -> Iterator[dict[str, Any]]:
        """End the last block."""
        if not self._open:
            return
        self._open = False
        block = self.content[-1]
        if block["type"] == "tool_use":
            self.content[-1] = complete_call(block, self._arguments)
            self._arguments = ""
        yield {"type": "content_block_stop", "index": len(self.content) - 1}

    def _begin(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.close()
        self.content.append(block)
        self._open = True
        yield {"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}
        if len(self.content) == 1:
            yield PING

    def _gain(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}


def complete_call(block: dict[str, Any], arguments: str) -> dict[str, Any]:
    """The block of a call with its arguments. A call without a whole object of them cannot be carried out: it is text,
    as the model wrote it."""
    try:
        return block | {"input": msgspec.json.decode(arguments, type=dict[str, Any])}
    except (msgspec.DecodeError, RecursionError):
        return {"type": "text", "text": f'{{"name": "{block["name"]}", "arguments": {arguments}'}


def describe_stop(output: RequestOutput, calls: bool) -> dict[str, Any]:
    """Why the answer has ended, in Anthropic's words."""
    choice = output.outputs[0]
    if choice.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(choice.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
    return {"stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None}


def count_tokens(output: RequestOutput) -> dict[str, Any]:
    """Anthropic's `usage`: tokens of the prompt that were cached count apart from the others."""
    return describe_usage(
        len(output.prompt_token_ids), output.cached_tokens, sum(len(choice.token_ids) for choice in output.outputs)
    )


def describe_usage(prompt: int, cached: int, written: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": written,
    }
