"""Bodies of /v1/responses said as bodies of /v1/chat/completions. Knows no answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.core import RowError
from headrace.job.fields import MOST_TOKENS, Fields
from headrace.job.openai import Unknown
from headrace.job.tools import is_object, open_object, wrong
from headrace.server.projections import (
    Asked,
    Conversation,
    choose_function,
    judge,
    read_functions,
    read_list,
    read_name,
    read_texts,
    take_extras,
    unsupported,
)

LOGPROBS = "message.output_text.logprobs"
# Clients ask for it as a matter of course: no answer here has a reasoning item, so there is nothing to leave out.
REASONING = "reasoning.encrypted_content"
CHOICES = ("none", "auto", "required")
ROLES = ("user", "assistant", "system", "developer")
PARTS = ("input_text", "output_text")
# What would need a memory that a server without stored responses does not have.
NEVER = {
    "store": "nothing is stored here; make it false, or leave it out",
    "background": "there are no background responses; make a batch, or leave it out",
    "previous_response_id": "no response is stored here; send the whole conversation as input",
    "conversation": "no conversation is stored here; send the whole conversation as input",
    "prompt": "no prompt is stored here; send its text as instructions and input",
}
# They cannot change what is answered.
NO_EFFECT = ("prompt_cache_retention", "prompt_cache_options", "service_tier", "max_tool_calls")
# Texts that are only handed back.
ECHOED = ("user", "safety_identifier", "service_tier", "prompt_cache_key")


def read_response_body(values: Mapping[str, Any], unknown: Unknown) -> Asked:
    """What a body asks for. Raises RowError, naming the field, for what cannot be done; `unknown` says what becomes of
    unknown fields."""
    fields = Fields(values, "")
    refuse_memory(fields)
    for name in ECHOED:
        Fields(values, "").text(name)
    body = read_conversation(fields) | read_tools(fields) | read_form(fields) | read_logprobs(fields)
    body |= take_extras(fields)
    sampling = {
        "max_completion_tokens": fields.whole("max_output_tokens", 1, MOST_TOKENS),
        "temperature": fields.take("temperature"),
        "top_p": fields.take("top_p"),
        "stop": fields.take("stop"),
    }
    body |= {name: value for name, value in sampling.items() if value is not None}
    stream = fields.switch("stream") or False
    fields.mapping("metadata")
    fields.ignore("truncation", ("disabled",))
    # What is nested here asks for reasoning, or for padding of events; these values ask for nothing.
    read_harmless(fields, "reasoning", {"effort": ("none",)})
    read_harmless(fields, "stream_options", {"include_obfuscation": (False,)})
    for name in (*ECHOED, *NO_EFFECT):
        fields.take(name)
    return Asked(body, stream, judge(fields, unknown))


def refuse_memory(fields: Fields) -> None:
    for name, reason in NEVER.items():
        fields.ignore(name, (False,))
        if fields.has(name):
            raise RowError("unsupported_field", f"{name}: {reason}")


def read_harmless(fields: Fields, name: str, harmless: Mapping[str, tuple[Any, ...]]) -> None:
    """An object of which only some values can be taken; others count as unknown fields."""
    inner = Fields(fields.mapping(name) or {}, f"{name}.", parent=fields)
    for field, values in harmless.items():
        inner.ignore(field, values)
    inner.report()


def read_logprobs(fields: Fields) -> dict[str, Any]:
    include, top = fields.texts("include") or (), fields.whole("top_logprobs", 0, 20)
    for place, name in enumerate(include):
        if name not in (LOGPROBS, REASONING):
            raise RowError("unsupported_field", f"include[{place}] is {name!r:.60}: only {LOGPROBS} can be included")
    if top and LOGPROBS not in include:
        raise RowError("invalid_value", f"top_logprobs needs include to hold {LOGPROBS}")
    return {"logprobs": True, "top_logprobs": top or 0} if LOGPROBS in include else {}


def read_form(fields: Fields) -> dict[str, Any]:
    """The form of the answer, `text.format`; as long or short as the model makes it."""
    text = Fields(fields.mapping("text") or {}, "text.", parent=fields)
    form = text.mapping("format")
    text.ignore("verbosity", ("medium",))
    text.report()
    if form is None:
        return {}
    inner = Fields(form, "text.format.", parent=fields)
    kind = inner.take("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise wrong("text.format.type", "text, json_object or json_schema", kind)
    if kind != "json_schema":
        inner.report()
        return {"response_format": {"type": kind}}
    schema = inner.mapping("schema")
    if schema is None:
        raise RowError("missing_field", "text.format.schema is missing")
    for name in ("name", "description", "strict"):
        inner.take(name)
    inner.report()
    return {"response_format": {"type": kind, "json_schema": {"name": "answer", "schema": schema}}}


def read_tools(fields: Fields) -> dict[str, Any]:
    functions = read_functions(fields, ("function",), "parameters")
    found: dict[str, Any] = {"tools": list(functions.values())} if functions else {}
    parallel = fields.switch("parallel_tool_calls")
    if parallel is not None:
        found["parallel_tool_calls"] = parallel
    choice = fields.take("tool_choice")
    if isinstance(choice, dict):
        inner = open_object(choice, "tool_choice", fields)
        kind = inner.take("type")
        if kind != "function":
            raise wrong("tool_choice.type", '"function"', kind)
        choice = choose_function(inner.take("name"), "tool_choice.name", functions)
        inner.report()
    elif choice is not None and choice not in CHOICES:
        raise wrong("tool_choice", "none, auto, required or an object that names a function", choice)
    if choice == "required" and not functions:
        raise RowError("invalid_value", "tool_choice is required, but the body has no tools")
    return found | ({} if choice is None else {"tool_choice": choice})


def read_conversation(fields: Fields) -> dict[str, Any]:
    """`instructions` and `input`. What an assistant says and calls in neighbouring items is one message."""
    talk = Conversation(joined=("assistant",))
    instructions = fields.text("instructions")
    if instructions:
        talk.say("system", instructions)
    given = fields.take("input")
    if isinstance(given, str):
        talk.say("user", given)
        return {"messages": talk.messages}
    items = read_list(given or [], "input", fields)
    if not items:
        raise RowError("missing_field", "input must be a text or a list of at least one item")
    for item in items:
        read_item(item, talk, fields)
    return {"messages": talk.messages}


def read_item(item: Fields, talk: Conversation, around: Fields) -> None:
    kind = item.take("type") or "message"
    if kind == "message":
        role = item.take("role")
        if role not in ROLES:
            raise wrong(f"{item.prefix}role", "user, assistant, system or developer", role)
        talk.say(role, read_content(item, "content", around))
    elif kind == "function_call":
        arguments = item.text("arguments")
        if arguments is None or not is_object(arguments):
            raise wrong(f"{item.prefix}arguments", "the JSON text of an object", arguments)
        talk.call(read_name(item, "call_id"), read_name(item, "name"), arguments)
        item.ignore("caller", ({"type": "direct"},))
    elif kind == "function_call_output":
        text = read_content(item, "output", around)
        talk.answer(read_name(item, "call_id"), text, f"{item.prefix}call_id")
        item.ignore("caller", ({"type": "direct"},))
        item.take("name")
    else:
        raise unsupported(item, kind)
    for name in ("id", "status"):
        item.take(name)
    item.report()


def read_content(item: Fields, name: str, around: Fields) -> str:
    """A text or its parts."""
    value = item.take(name)
    if value is None:
        raise RowError("missing_field", f"{item.prefix}{name} is missing")
    return read_texts(value, f"{item.prefix}{name}", PARTS, around)
