"""Answers in the form of /v1/responses, whole or as events. Knows no body and no engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headrace.engine.outputs import RequestOutput
from headrace.job.bodies import call_id, hash_id
from headrace.job.tool_stream import CallStarted, Event, Text

Body = dict[str, Any]


class ResponseWriter:
    """Writes the events of one answer, called `name`; `output` holds the items that they make.

    `logprobs` are described tokens whose text has not been told of yet: they go with the next text. Calls have none.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.output: list[Body] = []
        self.logprobs: list[Body] = []
        self._open = False
        self._told = 0

    def tell(self, kind: str, **values: Any) -> Body:
        """An event, numbered."""
        self._told += 1
        return {"type": f"response.{kind}", "sequence_number": self._told - 1, **values}

    def write(self, event: Event) -> Iterator[Body]:
        """The events that tell of what the answer has gained."""
        if isinstance(event, Text):
            yield from self._say(event.text)
        elif isinstance(event, CallStarted):
            self.logprobs.clear()
            name = f"fc_{hash_id(f'{self.name}/{event.index}')}"
            call = {"id": name, "type": "function_call", "status": "in_progress", "arguments": ""}
            yield from self._begin(call | {"call_id": call_id(self.name, 0, event.index), "name": event.name})
        else:
            self.logprobs.clear()
            self.output[-1]["arguments"] += event.text
            yield self._tell_item("function_call_arguments.delta", delta=event.text)

    def finish(self, whole: bool) -> Iterator[Body]:
        """End the last item, which is not `whole` where the answer was cut; an empty answer is an empty message."""
        if not self.output:
            yield from self._say("")
        yield from self._close("completed" if whole else "incomplete")

    def _say(self, text: str) -> Iterator[Body]:
        if not self._open or self.output[-1]["type"] != "message":
            name = f"msg_{hash_id(f'{self.name}/text/{len(self.output)}')}"
            message = {"id": name, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
            yield from self._begin(message)
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._tell_item("content_part.added", content_index=0, part=part)
            self.output[-1]["content"] = [part | {"logprobs": []}]
        new, self.logprobs = self.logprobs, []
        part = self.output[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += new
        if text or new:
            yield self._tell_item("output_text.delta", content_index=0, delta=text, logprobs=new)

    def _begin(self, item: Body) -> Iterator[Body]:
        yield from self._close("completed")
        self.output.append(item)
        self._open = True
        yield self.tell("output_item.added", output_index=len(self.output) - 1, item=dict(item))

    def _close(self, status: str) -> Iterator[Body]:
        if not self._open:
            return
        if self.logprobs and self.output[-1]["type"] == "message":
            yield from self._say("")
        self._open = False
        item = self.output[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            yield self._tell_item("output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"])
            yield self._tell_item("content_part.done", content_index=0, part=part)
        else:
            yield self._tell_item("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        yield self.tell("output_item.done", output_index=len(self.output) - 1, item=item)

    def _tell_item(self, kind: str, **values: Any) -> Body:
        return self.tell(kind, item_id=self.output[-1]["id"], output_index=len(self.output) - 1, **values)


def describe_end(output: RequestOutput) -> Body:
    """How and why the answer has ended, and what it took."""
    whole = output.outputs[0].finish_reason != "length"
    return {
        "status": "completed" if whole else "incomplete",
        "incomplete_details": None if whole else {"reason": "max_output_tokens"},
        "usage": count_tokens(output),
    }


def count_tokens(output: RequestOutput) -> Body:
    """OpenAI's `usage` in its newer words."""
    prompt, written = len(output.prompt_token_ids), sum(len(choice.token_ids) for choice in output.outputs)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": output.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + written,
    }
