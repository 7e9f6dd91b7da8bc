"""Bodies of /v1/messages said as bodies of /v1/chat/completions. Knows no answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from headrace.core import RowError
from headrace.job.fields import MOST_TOKENS, Fields
from headrace.job.openai import Unknown
from headrace.job.tools import open_object, wrong
from headrace.server.projections import (
    Asked,
    Conversation,
    choose_function,
    judge,
    read_functions,
    read_list,
    read_name,
    read_text_block,
    read_texts,
    take_extras,
    unsupported,
)

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
TIERS = ("auto", "standard_only")
MOST_STOPS = 16
# By this word clients know that they are to send whole conversations.
UNTHREADED = "thread_unsupported_request"


def read_message_body(values: Mapping[str, Any], unknown: Unknown, counting: bool = False) -> Asked:
    """What a body asks for; one that is only to be counted needs no max_tokens.

    Raises RowError, naming the field, for what cannot be done; `unknown` says what becomes of unknown fields.
    """
    fields = Fields(values, "")
    if fields.has("thread"):
        raise RowError(UNTHREADED, "thread: no conversation is stored here; send all its messages")
    body = read_conversation(fields) | read_tools(fields) | read_form(fields) | take_extras(fields)
    body |= read_sampling(fields, counting)
    stream = fields.switch("stream") or False
    fields.take("cache_control")
    fields.ignore("thinking", ({"type": "disabled"},))
    metadata = Fields(fields.mapping("metadata") or {}, "metadata.", parent=fields)
    metadata.text("user_id")
    metadata.report()
    tier = fields.text("service_tier")
    if tier is not None and tier not in TIERS:
        raise wrong("service_tier", " or ".join(TIERS), tier)
    return Asked(body, stream, judge(fields, unknown))


def read_sampling(fields: Fields, counting: bool) -> dict[str, Any]:
    most = fields.whole("max_tokens", 1, MOST_TOKENS)
    if most is None and not counting:
        raise RowError("missing_field", "max_tokens is missing: say how many tokens the answer may have")
    temperature = fields.number("temperature")
    if temperature is not None and not 0 <= temperature <= 1:
        raise wrong("temperature", "a number from 0 to 1", temperature)
    stops = fields.texts("stop_sequences") or ()
    if not all(stops) or len(stops) > MOST_STOPS:
        raise wrong("stop_sequences", f"at most {MOST_STOPS} texts that are not empty", stops)
    found = {"max_tokens": most, "temperature": temperature, "top_p": fields.take("top_p"), "stop": list(stops) or None}
    return {name: value for name, value in found.items() if value is not None}


def read_form(fields: Fields) -> dict[str, Any]:
    """The JSON schema of `output_config.format`, where there is one."""
    config = Fields(fields.mapping("output_config") or {}, "output_config.", parent=fields)
    form = config.mapping("format")
    config.report()
    if form is None:
        return {}
    inner = Fields(form, "output_config.format.", parent=fields)
    kind, schema = inner.take("type"), inner.mapping("schema")
    if kind != "json_schema" or schema is None:
        raise wrong("output_config.format", "an object with the type json_schema and a schema", form)
    inner.report()
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def read_tools(fields: Fields) -> dict[str, Any]:
    functions = read_functions(fields, ("custom", None), "input_schema")
    found: dict[str, Any] = {"tools": list(functions.values())} if functions else {}
    if not fields.has("tool_choice"):
        return found
    choice = open_object(fields.take("tool_choice"), "tool_choice", fields)
    kind = choice.text("type")
    if choice.switch("disable_parallel_tool_use"):
        found["parallel_tool_calls"] = False
    if kind == "tool":
        found["tool_choice"] = choose_function(choice.take("name"), "tool_choice.name", functions)
    elif kind in CHOICES:
        found["tool_choice"] = CHOICES[kind]
    else:
        raise wrong("tool_choice.type", "auto, any, tool or none", kind)
    if kind == "any" and not functions:
        raise RowError("invalid_value", "tool_choice.type is any, but the body has no tools")
    choice.report()
    return found


def read_conversation(fields: Fields) -> dict[str, Any]:
    """`system` and `messages`. An assistant's message at their end is the beginning of the answer."""
    talk = Conversation(joined=("user", "assistant"))
    system = fields.take("system")
    if system not in (None, "", []):
        talk.say("system", read_texts(system, "system", ("text",), fields))
    messages = read_list(fields.take("messages") or [], "messages", fields)
    if not messages:
        raise RowError("missing_field", "messages must be a list of at least one message")
    for message in messages:
        read_message(message, talk, fields)
    last, where = talk.messages[-1], messages[-1].prefix.rstrip(".")
    if last["role"] != "assistant":
        return {"messages": talk.messages}
    if "tool_calls" in last:
        raise RowError("invalid_value", f"{where} calls tools: a user's message with their results must follow")
    if last["content"] != last["content"].rstrip() or not last["content"]:
        raise RowError("invalid_value", f"{where} is to be continued: it must not be empty, nor end with space")
    return {"messages": talk.messages, "continue_final_message": True}


def read_message(message: Fields, talk: Conversation, around: Fields) -> None:
    role, content, path = message.text("role"), message.take("content"), f"{message.prefix}content"
    if role not in ("user", "assistant", "system"):
        raise wrong(f"{message.prefix}role", "user, assistant or system", role)
    if content is None or content == []:
        raise RowError("missing_field", f"{path} is missing, or an empty list")
    message.report()
    if isinstance(content, str):
        talk.say(role, content)
        return
    spoken = False
    for block in read_list(content, path, around):
        kind = block.take("type")
        if kind == "text":
            spoken = True
            talk.say(role, read_text_block(block))
        elif kind == "tool_use" and role == "assistant":
            read_call(block, talk)
        elif kind == "tool_result" and role == "user":
            if spoken:
                raise RowError("invalid_value", f"{path} must begin with its tool_result blocks")
            read_result(block, talk, around)
        else:
            raise unsupported(block, kind)
        block.report()


def read_call(block: Fields, talk: Conversation) -> None:
    given = block.mapping("input")
    if given is None:
        raise RowError("missing_field", f"{block.prefix}input is missing")
    talk.call(read_name(block, "id"), read_name(block, "name"), json.dumps(given, ensure_ascii=False))
    block.take("cache_control")
    block.ignore("caller", ({"type": "direct"},))


def read_result(block: Fields, talk: Conversation, around: Fields) -> None:
    """A tool's result. Chat templates know no errors, so that one is says its text."""
    text = read_texts(block.take("content") or "", f"{block.prefix}content", ("text",), around)
    if block.switch("is_error"):
        text = f"Error: {text}"
    talk.answer(read_name(block, "tool_use_id"), text, f"{block.prefix}tool_use_id")
    block.take("cache_control")
