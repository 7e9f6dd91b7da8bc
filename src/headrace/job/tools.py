"""What a request says about tools, and the calls and results in its messages. Knows no model's way to write a call."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from headrace.core import RowError
from headrace.job.fields import Fields

MOST_TOOLS = 128
CHOICES = ("none", "auto", "required")
# Fields of the form that OpenAI had first, and those that took their place.
OLDER = {"functions": "tools", "function_call": "tool_choice"}
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask the client to call; `parameters` is the JSON schema of its arguments object."""

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Tools:
    """A request's tools. `choice` is "none", "auto", "required" or a tool's name, which no tool may share with these
    words. `parallel` allows several calls in one answer."""

    tools: tuple[Tool, ...]
    choice: str = "auto"
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """The answer must be a call, so it needs a grammar."""
        return self.choice not in ("none", "auto")

    @property
    def shown(self) -> tuple[Tool, ...]:
        """The tools that the model gets to see."""
        return () if self.choice == "none" else self.tools

    @property
    def allowed(self) -> tuple[Tool, ...]:
        """The tools that the answer may call."""
        named = tuple(tool for tool in self.tools if tool.name == self.choice)
        return named or self.shown


def read_tools(fields: Fields) -> Tools | None:
    """The body's `tools`, `tool_choice` and `parallel_tool_calls`. None where it has no tools. Raises RowError."""
    listed, path = fields.take("tools"), f"{fields.prefix}tools"
    listed = [] if listed is None else listed
    if not isinstance(listed, list):
        raise wrong(path, "a list", listed)
    if len(listed) > MOST_TOOLS:
        raise RowError("invalid_value", f"{path} may hold {MOST_TOOLS} tools, got {len(listed)}")
    tools: dict[str, Tool] = {}
    for place, value in enumerate(listed):
        tool, where = read_tool(value, f"{path}[{place}]", fields)
        if tool.name in tools:
            raise RowError("invalid_value", f"{where} is {tool.name!r}, as an earlier tool: names must differ")
        tools[tool.name] = tool
    choice = read_tool_choice(fields, tools)
    parallel = fields.switch("parallel_tool_calls") is not False
    return Tools(tuple(tools.values()), choice, parallel) if tools else None


def refuse_older_tools(fields: Fields) -> None:
    """Raise RowError for tools in the form that OpenAI had first: who asks in it wants calls in another form, too."""
    for older, newer in OLDER.items():
        if fields.has(older):
            message = f"{fields.prefix}{older}: the older form of tools is not supported; say it with {newer}"
            raise RowError("unsupported_field", message)


def read_tool(value: Any, path: str, around: Fields) -> tuple[Tool, str]:
    """One tool and the path of its name."""
    inner = open_function(value, path, around)
    where = f"{inner.prefix}name"
    name = inner.take("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise wrong(where, "1 to 64 letters, digits, _, . or -", name)
    if name in CHOICES:
        raise RowError("invalid_value", f"{where} is {name!r}, a word of tool_choice: choose another name")
    parameters = read_parameters(inner)
    tool = Tool(name, inner.text("description") or "", parameters, inner.switch("strict") or False)
    inner.report()
    return tool, where


def read_parameters(function: Fields) -> dict[str, Any]:
    """The schema of a function's arguments; without one it takes none."""
    schema = function.mapping("parameters")
    if schema is None:
        return {"type": "object", "properties": {}}
    kind = schema.get("type", "object")
    if kind != "object":
        raise wrong(f"{function.prefix}parameters.type", '"object"', kind)
    return {"type": "object"} | schema


def read_tool_choice(fields: Fields, tools: dict[str, Tool]) -> str:
    value, path = fields.take("tool_choice"), f"{fields.prefix}tool_choice"
    if value is None:
        return "auto"
    if isinstance(value, dict):
        function = open_function(value, path, fields)
        chosen = function.take("name")
        function.report()
        if not isinstance(chosen, str) or chosen not in tools:
            raise wrong(f"{function.prefix}name", "the name of one of the body's tools", chosen)
        return chosen
    if value not in CHOICES:
        raise wrong(path, "none, auto, required or an object that names a function", value)
    if value == "required" and not tools:
        raise RowError("invalid_value", f"{path} is required, but the body has no tools")
    return str(value)


def open_function(value: Any, path: str, around: Fields) -> Fields:
    """The `function` in an object of that type. Raises RowError."""
    outer = open_object(value, path, around)
    check_type(outer)
    inner = open_object(outer.take("function"), f"{outer.prefix}function", around)
    outer.report()
    return inner


def read_message_tools(message: Fields, role: str) -> dict[str, Any]:
    """What a message says about tools, to be laid over its role and content: an assistant's `tool_calls` (then its
    content may be null) or the `tool_call_id` that a tool's result answers. Raises RowError."""
    if role == "assistant":
        message.ignore("tool_calls", ([],))
        if not message.has("tool_calls"):
            return {}
        return {"tool_calls": read_calls(message.take("tool_calls"), f"{message.prefix}tool_calls")}
    if role == "tool":
        name = message.text("tool_call_id")
        if not name:
            raise RowError("missing_field", f"{message.prefix}tool_call_id is missing: it says which call was answered")
        return {"tool_call_id": name}
    message.ignore("tool_calls", ([],))
    return {}


def read_calls(value: Any, path: str) -> list[dict[str, Any]]:
    """An earlier answer's calls as OpenAI writes them: `arguments` is the JSON text of an object. Raises RowError."""
    if not isinstance(value, list):
        raise wrong(path, "a list of calls", value)
    calls = []
    for place, each in enumerate(value):
        call = open_object(each, f"{path}[{place}]")
        check_type(call)
        name = call.text("id")
        if not name:
            raise RowError("missing_field", f"{call.prefix}id is missing")
        function = open_object(call.take("function"), f"{call.prefix}function")
        called = function.take("name")
        if not isinstance(called, str) or not called:
            raise wrong(f"{function.prefix}name", "a text that is not empty", called)
        arguments = function.text("arguments") or "{}"
        if not is_object(arguments):
            raise wrong(f"{function.prefix}arguments", "the JSON text of an object", arguments)
        calls.append({"id": name, "type": "function", "function": {"name": called, "arguments": arguments}})
    return calls


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def open_object(value: Any, path: str, around: Fields | None = None) -> Fields:
    if not isinstance(value, dict):
        raise wrong(path, "an object", value)
    return Fields(value, f"{path}.", parent=around)


def check_type(fields: Fields) -> None:
    kind = fields.take("type")
    if kind != "function":
        raise wrong(f"{fields.prefix}type", '"function"', kind)


def wrong(path: str, right: str, value: object) -> RowError:
    return RowError("invalid_value", f"{path} must be {right}, got {json.dumps(value)[:60]}")
