"""What the routes share that give chats in other forms than /v1/chat/completions. Knows none of those forms."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from headrace.core import RowError
from headrace.engine.deltas import Delta
from headrace.engine.outputs import CompletionOutput
from headrace.job.fields import Fields
from headrace.job.openai import Unknown
from headrace.job.tools import CHOICES, NAME, open_object, wrong

# Fields that other forms do not have, and that mean here what they mean in /v1/chat/completions.
EXTRAS = (
    "seed", "top_k", "min_p", "min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "ignore_eos", "stop_token_ids", "skip_special_tokens", "chat_template_kwargs",
)  # fmt: skip
# Fields that say when a request is computed and what it is called, but not what is answered; `Call` reads some of them.
NO_EFFECT = ("model", "priority", "prompt_cache_key", "cache_salt", "request_id")
ENCODER = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Asked:
    """What a body asks for: `body` says it as one of /v1/chat/completions, `warnings` name what was ignored."""

    body: dict[str, Any]
    stream: bool
    warnings: tuple[str, ...]


class Conversation:
    """The messages of /v1/chat/completions, gathered piece by piece. Neighbours of a role in `joined` become one."""

    def __init__(self, joined: Container[str]) -> None:
        self.messages: list[dict[str, Any]] = []
        self._joined = joined
        self._calls: set[str] = set()

    def say(self, role: str, text: str) -> None:
        last = self._last(role)
        if last is None:
            self.messages.append({"role": role, "content": text})
        else:
            last["content"] = text if last["content"] is None else f"{last['content']}\n{text}"

    def call(self, name: str, function: str, arguments: str) -> None:
        """The assistant calls a function; `name` is the call's, `arguments` the JSON text of an object."""
        last = self._last("assistant")
        if last is None:
            last = {"role": "assistant", "content": None}
            self.messages.append(last)
        call = {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}
        last["tool_calls"] = [*last.get("tool_calls", []), call]
        self._calls.add(name)

    def answer(self, name: str, text: str, path: str) -> None:
        """The result of the call with this name. Raises RowError, naming the path, where there was no such call."""
        if name not in self._calls:
            raise RowError("invalid_value", f"{path} is {name!r:.80}: no call before it has this id")
        self.messages.append({"role": "tool", "tool_call_id": name, "content": text})

    def _last(self, role: str) -> dict[str, Any] | None:
        """The last message, if what this role says next belongs to it."""
        last = self.messages[-1] if self.messages else None
        return last if last is not None and last["role"] == role and role in self._joined else None


def take_extras(fields: Fields) -> dict[str, Any]:
    for name in NO_EFFECT:
        fields.take(name)
    return {name: fields.take(name) for name in EXTRAS if fields.has(name)}


def judge(fields: Fields, unknown: Unknown) -> tuple[str, ...]:
    """What to say of the fields that nobody took. Raises RowError where such fields are an error."""
    names = fields.left()
    if names and unknown == "error":
        message = f"{', '.join(names)}: not supported; take it out, or choose --unknown-fields warn or ignore"
        raise RowError("unknown_field", message)
    return tuple(f"{name}: not supported, ignored" for name in names) if unknown == "warn" else ()


def read_list(value: Any, path: str, around: Fields) -> list[Fields]:
    """The objects of a list, as fields. Raises RowError for anything else."""
    if not isinstance(value, list):
        raise wrong(path, "a list of objects", value)
    return [open_object(each, f"{path}[{place}]", around) for place, each in enumerate(value)]


def read_texts(value: Any, path: str, kinds: Container[str], around: Fields) -> str:
    """A text, or blocks of text whose type is one of `kinds`, joined by line ends. Raises RowError."""
    if isinstance(value, str):
        return value
    texts = []
    for block in read_list(value, path, around):
        kind = block.take("type")
        if not isinstance(kind, str) or kind not in kinds:
            raise unsupported(block, kind)
        texts.append(read_text_block(block))
        block.report()
    return "\n".join(texts)


def read_text_block(block: Fields) -> str:
    """The text of a block of text. Marks for a cache change nothing: prefixes are cached as they are."""
    text = block.text("text")
    if text is None:
        raise RowError("missing_field", f"{block.prefix}text is missing")
    for name in ("cache_control", "prompt_cache_breakpoint", "annotations", "citations", "logprobs"):
        block.take(name)
    return text


def unsupported(block: Fields, kind: object) -> RowError:
    where = block.prefix.rstrip(".")
    return RowError("unsupported_content", f"{where} has the type {kind!r:.60}, which cannot be read; only text can")


def read_name(fields: Fields, name: str) -> str:
    """A field that must be there: a text that is not empty. Raises RowError."""
    value = fields.take(name)
    if not isinstance(value, str) or not value:
        raise wrong(f"{fields.prefix}{name}", "a text that is not empty", value)
    return value


def read_functions(fields: Fields, kinds: Container[str | None], schema: str) -> dict[str, dict[str, Any]]:
    """The body's `tools` as /v1/chat/completions has them, by name. Functions have a type of `kinds`, and call the
    schema of their arguments `schema`. Raises RowError for other tools."""
    found: dict[str, dict[str, Any]] = {}
    tools = fields.take("tools")
    for tool in read_list([] if tools is None else tools, f"{fields.prefix}tools", fields):
        kind = tool.text("type")
        if kind not in kinds:
            raise RowError(
                "unsupported_tool", f"{tool.prefix}type is {kind!r:.60}: only functions of yours can be tools"
            )
        name = tool.take("name")
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in CHOICES:
            taken = ", ".join(CHOICES)
            raise wrong(f"{tool.prefix}name", f"1 to 64 letters, digits, _, . or -, and not one of {taken}", name)
        if name in found:
            raise RowError("invalid_value", f"{tool.prefix}name is {name!r}, as an earlier tool: names must differ")
        parameters = tool.mapping(schema) or {"type": "object", "properties": {}}
        if parameters.get("type", "object") != "object":
            raise wrong(f"{tool.prefix}{schema}.type", '"object"', parameters["type"])
        function = {"name": name, "description": tool.text("description") or "", "parameters": parameters}
        found[name] = {"type": "function", "function": function | {"strict": tool.switch("strict") or False}}
        # They say when arguments are sent, and what is cached.
        for field in ("cache_control", "eager_input_streaming"):
            tool.take(field)
        tool.report()
    return found


def choose_function(name: object, path: str, functions: Mapping[str, Any]) -> dict[str, Any]:
    """The `tool_choice` of /v1/chat/completions for one function. Raises RowError for one that is not there."""
    if not isinstance(name, str) or name not in functions:
        raise wrong(path, "the name of one of the body's tools", name)
    return {"type": "function", "function": {"name": name}}


def make_delta(output: CompletionOutput) -> Delta:
    """A whole answer as one piece, so that it is read as a stream is."""
    return Delta(output.index, output.text, output.token_ids, output.logprobs, output.finish_reason)


def encode_event(body: Mapping[str, Any]) -> bytes:
    """A server-sent event, named by its body's type."""
    return b"event: %b\ndata: %b\n\n" % (str(body["type"]).encode(), ENCODER.encode(body))
