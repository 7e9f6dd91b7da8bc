"""How families of models are told of tools and write their calls. Knows no engine, no tokenizer and no HTTP.

A model's own chat template says which family it is of. A template that says nothing of tools, or writes calls in a way
not known here, gets a system message that describes the tools and the form of a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from itertools import takewhile
from typing import Any, ClassVar, Protocol, Self

from headrace.job.tool_stream import Marks, ToolCall, ToolStream, join_events
from headrace.job.tools import Tool, Tools

Message = dict[str, Any]
FindToken = Callable[[str], int | None]
# Spaces as Python's json writes them, which is how the models saw calls in training.
JSON_STYLE = {"x-guidance": {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}}
MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")


class ToolFormat(Protocol):
    """One family's way with tools. `parallel`: an answer may have several calls."""

    parallel: bool

    def prepare(self, messages: list[Message], tools: Tools | None) -> tuple[list[Message], list[Message] | None]:
        """The messages to render, with earlier calls and results as the template understands them, and the template's
        `tools`, None where it gets none. Messages hold calls as `read_calls` gives them; they are not changed."""
        ...

    def grammar(self, tools: Tools) -> str:
        """A Lark grammar of llguidance: one call of an allowed tool, several if `tools.parallel`, nothing else."""
        ...

    def single(self) -> Self:
        """The same, not parallel: of the calls that a model writes, its first is read and the others are left out."""
        ...

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        """An answer's free text and its calls; calls that are malformed stay text."""
        ...

    def open_stream(self) -> ToolStream:
        """A stream whose events make what `parse` gives for the whole text."""
        ...


class TemplateFormat:
    """What families share whose templates know tools: the template writes them and earlier calls."""

    marks: ClassVar[Marks] = Marks("<tool_call>", "</tool_call>")
    arguments: ClassVar[str] = "arguments"

    def __init__(self, find_token: FindToken, parallel: bool = True) -> None:
        self.find_token = find_token
        self.parallel = parallel

    def single(self) -> Self:
        return type(self)(self.find_token, parallel=False)

    def prepare(self, messages: list[Message], tools: Tools | None) -> tuple[list[Message], list[Message] | None]:
        shown = describe_tools(tools)
        return [self.convert(message) for message in messages], shown or None

    def convert(self, message: Message) -> Message:
        calls = message.get("tool_calls")
        if not calls:
            return message
        return message | {"content": message.get("content") or "", "tool_calls": [load_call(call) for call in calls]}

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        return join_events(self.open_stream().push(text, last=True))

    def open_stream(self) -> ToolStream:
        return ToolStream(self.marks, self.parallel)

    def write_grammar(self, tools: Tools, several: str, one: str) -> str:
        """The rules of a format: `several` or `one` is what starts, made of `call`, a call's object."""
        start = several if tools.parallel else one
        rules = [f"start: {start}", "call: " + " | ".join(f"call_{place}" for place in range(len(tools.allowed)))]
        rules += [f"call_{place}: {self.write_call(tool)}" for place, tool in enumerate(tools.allowed)]
        return "\n".join(rules)

    def write_call(self, tool: Tool) -> str:
        """The schema stands alone, not within one for the call, so that its own references hold."""
        head = quote(f'{{"name": "{tool.name}", "{self.arguments}": ')
        return f'{head} %json {json.dumps(JSON_STYLE | tool.parameters, ensure_ascii=False)} "}}"'

    def mark(self, text: str) -> str:
        """A mark in a grammar: the vocabulary's own token where it has one, which models write, else its letters."""
        token = self.find_token(text)
        return quote(text) if token is None else f"<[{token}]>"


class HermesFormat(TemplateFormat):
    """Hermes, Qwen and others: each call between marks of its own, on lines of their own."""

    def grammar(self, tools: Tools) -> str:
        block = f'{self.mark(self.marks.open)} "\\n" call "\\n" {self.mark(self.marks.close)}'
        return self.write_grammar(tools, f'{block} ("\\n" {block})*', block)


class MistralFormat(TemplateFormat):
    """Mistral: a mark and a list of calls. Its templates insist on ids of nine letters and digits."""

    marks = Marks("[TOOL_CALLS]", "", bare=True)

    def convert(self, message: Message) -> Message:
        message = super().convert(message)
        calls = [call | {"id": shorten_id(call["id"])} for call in message.get("tool_calls") or []]
        changed = {"tool_calls": calls} if calls else {}
        answered = message.get("tool_call_id")
        return message | changed | ({"tool_call_id": shorten_id(answered)} if answered else {})

    def grammar(self, tools: Tools) -> str:
        head = f'{self.mark(self.marks.open)} " "? "["'
        return self.write_grammar(tools, f'{head} call (", " call)* "]"', f'{head} call "]"')


class LlamaFormat(TemplateFormat):
    """Llama 3.1 and 3.2: the answer is the call. Their templates take one call a message, so several are spread out."""

    marks = Marks("<|python_tag|>", "", bare=True)
    arguments = "parameters"

    def prepare(self, messages: list[Message], tools: Tools | None) -> tuple[list[Message], list[Message] | None]:
        return super().prepare(list(spread_calls(messages)), tools)

    def grammar(self, tools: Tools) -> str:
        return self.write_grammar(tools, 'call ("; " call)*', "call")


class DescribedFormat(TemplateFormat):
    """For templates that say nothing of tools: the form that SmolLM2 was taught, all of it in messages' text."""

    def prepare(self, messages: list[Message], tools: Tools | None) -> tuple[list[Message], list[Message] | None]:
        prepared: list[Message] = []
        for place, message in enumerate(messages):
            if message["role"] != "tool":
                prepared.append(write_calls(message))
                continue
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if place and messages[place - 1]["role"] == "tool":  # templates want the roles to alternate
                prepared[-1] = {"role": "user", "content": f"{prepared[-1]['content']}\n{result}"}
            else:
                prepared.append({"role": "user", "content": result})
        shown = describe_tools(tools)
        if shown:
            prepared = add_instructions(prepared, shown)
        return prepared, None

    def grammar(self, tools: Tools) -> str:
        head, tail = self.mark(self.marks.open) + ' "["', f'"]" {self.mark(self.marks.close)}'
        return self.write_grammar(tools, f'{head} call (", " call)* {tail}', f"{head} call {tail}")


def choose_format(chat_template: str | None, find_token: FindToken = lambda text: None) -> ToolFormat:
    """The family's format by what its template writes. `find_token` gives the id of a text that is one token, so that
    grammars ask for the marks as tokens: a special token is not made of letters."""
    template = chat_template or ""
    if "[TOOL_CALLS]" in template and "[ARGS]" not in template:
        return MistralFormat(find_token)
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        return HermesFormat(find_token)
    if "<|python_tag|>" in template or ("ipython" in template and "parameters" in template):
        return LlamaFormat(find_token)
    return DescribedFormat(find_token)


def describe_tools(tools: Tools | None) -> list[Message]:
    """The tools that the model is shown, as templates take them."""
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
        }
        for tool in (tools.shown if tools else ())
    ]


def load_call(call: Mapping[str, Any]) -> Message:
    """A call with its arguments as an object instead of JSON text."""
    function = call["function"]
    return {**call, "function": function | {"arguments": json.loads(function["arguments"])}}


def shorten_id(name: str) -> str:
    return name if MISTRAL_ID.fullmatch(name) else blake2b(name.encode()).hexdigest()[:9]


def spread_calls(messages: list[Message]) -> Iterator[Message]:
    """The messages with one call an assistant's message, each followed by its result, where there is one."""
    place = 0
    while place < len(messages):
        message, calls = messages[place], messages[place].get("tool_calls") or []
        place += 1
        if len(calls) < 2:
            yield message
            continue
        results = list(takewhile(lambda each: each["role"] == "tool", messages[place:]))
        place += len(results)
        for call in calls:
            yield message | {"tool_calls": [call]}
            yield from (result for result in results if result.get("tool_call_id") == call["id"])
            message = message | {"content": ""}


def write_calls(message: Message) -> Message:
    """An assistant's message with its calls written out as text."""
    calls = [load_call(call)["function"] for call in message.get("tool_calls") or []]
    if not calls:
        return message
    written = json.dumps([{"name": call["name"], "arguments": call["arguments"]} for call in calls], ensure_ascii=False)
    said = f"{message['content']}\n" if message.get("content") else ""
    return {"role": "assistant", "content": f"{said}<tool_call>{written}</tool_call>"}


def add_instructions(messages: list[Message], shown: list[Message]) -> list[Message]:
    """The messages with the tools in the system message, behind what it already says."""
    text = (
        "You can call the tools that are listed here, one JSON object each:\n"
        f"<tools>{json.dumps(shown, ensure_ascii=False)}</tools>\n"
        "To call tools, answer with nothing but the list of calls, in this form:\n"
        '<tool_call>[{"name": "a tool\'s name", "arguments": {"an argument\'s name": "its value"}}]</tool_call>\n'
        "Their results come back within <tool_response></tool_response>. Where no tool helps, answer in words."
    )
    first = messages[0] if messages else {}
    if first.get("role") == "system":
        return [first | {"content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
