"""An answer that grows, as words and calls of tools. Shared by all forms of chat; knows none of them."""

from __future__ import annotations

from headrace.engine.deltas import Delta
from headrace.job.tool_formats import ToolFormat
from headrace.job.tool_stream import CallStarted, Event, Text


class ReplyReader:
    """Reads the deltas of one choice. `form` is how it may call tools, None where it has none."""

    def __init__(self, form: ToolFormat | None) -> None:
        self._stream = None if form is None else form.open_stream()
        self._calls = False

    def read(self, delta: Delta) -> list[Event]:
        """What the delta says; text that may yet become a call comes later."""
        if self._stream is None:
            return [Text(delta.text)] if delta.text else []
        events = self._stream.push(delta.text, last=delta.finish_reason is not None)
        self._calls = self._calls or any(isinstance(event, CallStarted) for event in events)
        return events

    def finish_reason(self, delta: Delta) -> str | None:
        """Why the choice has ended, as OpenAI says it; None while it goes on."""
        return "tool_calls" if self._calls and delta.finish_reason == "stop" else delta.finish_reason
