"""Tool calling: what requests say, what models are shown, and calls read out of text that is cut anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.checkpoint import Tokenizer, open_checkpoint
from headrace.checkpoint.chat import ChatTemplate
from headrace.core import Constraint, RowError
from headrace.engine.structure import ConstraintCompiler
from headrace.job.fields import Fields
from headrace.job.tool_formats import (
    DescribedFormat,
    HermesFormat,
    LlamaFormat,
    MistralFormat,
    ToolFormat,
    choose_format,
)
from headrace.job.tool_stream import Arguments, CallStarted, Event, Text, ToolCall, join_events
from headrace.job.tools import Tool, Tools, read_calls, read_message_tools, read_tools

WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/place"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "string", "minLength": 1}},
}
CLOCK = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = Tools((Tool("weather", "Tells the weather.", WEATHER), Tool("clock.now", "", CLOCK)), "required")
TEMPLATES: dict[str, type[ToolFormat]] = {
    "{% if tools %}<tool_call>{% endif %}": HermesFormat,
    "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]": MistralFormat,
    "{% if tools %}<|python_tag|>{% endif %}": LlamaFormat,
    '{% if tools %}ipython {"name": n, "parameters": p}{% endif %}': LlamaFormat,
    "{{ messages[0].content }}": DescribedFormat,
    "{% if tools %}<tool_call><function=name>{% endif %}": DescribedFormat,
    "{% if tools %}[TOOL_CALLS]name[ARGS]{% endif %}": DescribedFormat,
}
FORMATS = [choose_format(template) for template in list(TEMPLATES)[:3]] + [choose_format(None)]
HERMES, MISTRAL, LLAMA, DESCRIBED = FORMATS
each_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: type(form).__name__)


def function(name: Any = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def read(**body: Any) -> Tools | None:
    return read_tools(Fields(body, "body."))


def test_tools_are_read() -> None:
    parameters = {"properties": {"a": {"type": "string"}}}
    tools = read(
        tools=[function("f", description="does f", parameters=parameters, strict=True), function("g-1.x")],
        tool_choice={"type": "function", "function": {"name": "g-1.x"}},
        parallel_tool_calls=False,
    )
    first = Tool("f", "does f", {"type": "object", **parameters}, True)
    second = Tool("g-1.x", "", {"type": "object", "properties": {}})
    assert tools == Tools((first, second), "g-1.x", False)
    assert tools.forced and tools.shown == (first, second) and tools.allowed == (second,)


@pytest.mark.parametrize("body", [{}, {"tools": []}, {"tool_choice": "auto"}, {"tools": [], "tool_choice": "none"}])
def test_no_tools(body: dict[str, Any]) -> None:
    assert read(**body, parallel_tool_calls=True) is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"tools": {"f": 1}}, "body.tools must be a list"),
        ({"tools": [1]}, "body.tools[0] must be an object"),
        ({"tools": [{"type": "custom"}]}, "body.tools[0].type must be"),
        ({"tools": [{"type": "function"}]}, "body.tools[0].function must be an object"),
        ({"tools": [function("ok"), function("not ok")]}, "body.tools[1].function.name must be"),
        ({"tools": [function("a" * 65)]}, "body.tools[0].function.name"),
        ({"tools": [function("ok\n")]}, "body.tools[0].function.name"),
        ({"tools": [function("auto")]}, "body.tools[0].function.name is 'auto'"),
        ({"tools": [function(), function()]}, "body.tools[1].function.name is 'f'"),
        ({"tools": [function(parameters=[])]}, "body.tools[0].function.parameters must be an object"),
        ({"tools": [function(parameters={"type": "array"})]}, "body.tools[0].function.parameters.type"),
        ({"tools": [function(f"f{n}") for n in range(129)]}, "body.tools may hold 128 tools, got 129"),
        ({"tools": [function()], "tool_choice": "maybe"}, "body.tool_choice must be none, auto"),
        ({"tools": [function()], "tool_choice": function("g")}, "body.tool_choice.function.name must be"),
        ({"tools": [function()], "tool_choice": {"type": "allowed_tools"}}, "body.tool_choice.type"),
        ({"tool_choice": "required"}, "body.tool_choice is required, but"),
        ({"tool_choice": function("f")}, "body.tool_choice.function.name"),
        ({"tool_choice": function([])}, "body.tool_choice.function.name"),
    ],
)
def test_wrong_tools_say_where(body: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        read(**body)
    assert caught.value.code == "invalid_value"
    assert words in str(caught.value)


def test_unknown_fields_of_tools_are_reported() -> None:
    fields = Fields({"tools": [function(colour="red") | {"defer": True}]}, "body.")
    assert read_tools(fields) is not None
    assert sorted(fields.left()) == ["body.tools[0].defer", "body.tools[0].function.colour"]


def call(name: str, arguments: str, call_id: str = "call_1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_messages_with_calls() -> None:
    assert read_calls([call("f", '{"a": 1}'), call("g", "")], "p") == [call("f", '{"a": 1}'), call("g", "{}")]
    message = Fields({"tool_calls": [call("f", "{}")]}, "body.messages[1].")
    assert read_message_tools(message, "assistant") == {"tool_calls": [call("f", "{}")]}
    assert read_message_tools(Fields({"tool_call_id": "call_1"}, "m."), "tool") == {"tool_call_id": "call_1"}
    asked = Fields({"tool_calls": [call("f", "{}")]}, "m.")
    assert read_message_tools(asked, "user") == {} and asked.left() == ["m.tool_calls"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("f", "p must be a list of calls"),
        ([call("f", "{}"), 1], "p[1] must be an object"),
        ([call("f", "[1]")], "p[0].function.arguments must be the JSON text of an object"),
        ([call("f", '{"a": ')], "p[0].function.arguments"),
        ([call("f", "[" * 100_000)], "p[0].function.arguments"),
        ([call("", "{}")], "p[0].function.name"),
        ([call("f", "{}", "")], "p[0].id"),
        ([{"id": "a", "type": "custom"}], "p[0].type"),
    ],
)
def test_wrong_calls_say_where(value: Any, words: str) -> None:
    with pytest.raises(RowError, match=words.replace("[", "\\[").replace(".", "\\.")):
        read_calls(value, "p")
    with pytest.raises(RowError, match="tool_call_id"):
        read_message_tools(Fields({}, "m."), "tool")


@pytest.mark.parametrize(("template", "kind"), TEMPLATES.items())
def test_the_template_chooses_the_format(template: str, kind: type) -> None:
    assert type(choose_format(template)) is kind


def write(form: ToolFormat, calls: list[tuple[str, Any]], dump: Callable[[Any], str] = json.dumps) -> str:
    """Calls as a model of the family writes them."""
    key = "parameters" if form is LLAMA else "arguments"
    objects = [f'{{"name": "{name}", "{key}": {dump(arguments)}}}' for name, arguments in calls]
    if form is HERMES:
        return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects)
    if form is LLAMA:
        return "; ".join(objects)
    listed = f"[{', '.join(objects)}]"
    return f"[TOOL_CALLS]{listed}" if form is MISTRAL else f"<tool_call>{listed}</tool_call>"


NASTY = {
    "code": 'if (a) { b("}]</tool_call>\\"); }',
    "deep": {"x": [{"y": "[["}, []]},
    "日本": "naïve 🎉\n",
    "n": -1.5e3,
}


@each_format
@pytest.mark.parametrize("dump", [json.dumps, lambda value: json.dumps(value, ensure_ascii=False, indent=1)])
def test_round_trip(form: ToolFormat, dump: Callable[[Any], str]) -> None:
    written = [("weather", {"city": "Oslo"}), ("clock.now", {}), ("weather", NASTY)]
    for count in (1, 2, 3):
        text, calls = form.parse(write(form, written[:count], dump))
        assert text == ""
        assert [(each.name, json.loads(each.arguments)) for each in calls] == written[:count]
        assert calls[-1].arguments == dump(written[count - 1][1])


@pytest.mark.parametrize("form", [HERMES, MISTRAL, DESCRIBED], ids=lambda form: type(form).__name__)
def test_text_around_calls_is_kept(form: ToolFormat) -> None:
    text, calls = form.parse(" I look.\n" + write(form, [("f", {"a": 1})]) + "\nDone. ")
    assert text == " I look.\n\nDone. "
    assert calls == [ToolCall("f", '{"a": 1}')]


ODD_CALLS = [
    ('<tool_call>{"arguments": {"a": "}"}, "id": "x", "name": "f"}</tool_call>', "", [("f", '{"a": "}"}')]),
    ('<tool_call>[{"type": "function", "n": [1, {}], "name": "f", "arguments": {}}]</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": {}} {"name": "g", "arguments": {}}', "", [("f", "{}"), ("g", "{}")]),
    ('<tool_call><tool_call>{"name": "f", "arguments": {}}</tool_call>', "<tool_call>", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> ok', " ok", [("f", '{"a": 1}')]),
    ('<tool_call>{"name": "f", "arguments": {}}\nBye', "\nBye", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": {}}</tool_', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": {"a": "cut o', "", [("f", '{"a": "cut o')]),
    ('<tool_call>[{"name": "f", "arguments": {}}, {"name"]</tool_call>', ', {"name"]</tool_call>', [("f", "{}")]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "free", "calls"), ODD_CALLS)
def test_odd_calls(text: str, free: str, calls: list[tuple[str, str]]) -> None:
    assert HERMES.parse(text) == (free, [ToolCall(*each) for each in calls])


@each_format
@pytest.mark.parametrize(
    "inner",
    [
        "",
        "[]",
        "{}",
        "hello",
        '{"name": "f"}',
        '{"name": "f", "argu',
        '{"name": "f", "arguments": null}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": "not a name", "arguments": {}}',
        '{"name": 1, "arguments": {}}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name" "f", "arguments": {}}',
        '{"arguments": {"a": 1}}',
        '{"id": , "name": "f", "arguments": {}}',
        '{"arguments": {"a": ',
        '["f", {}]',
        '{"name": "Ada", "age": 36}',
    ],
)
def test_malformed_calls_stay_text(form: ToolFormat, inner: str) -> None:
    marks = form.open_stream().marks
    for text in (f"Well: {marks.open}{inner}{marks.close} so", f"{marks.open}\n{inner}", f" {inner}"):
        assert form.parse(text) == (text, [])


def test_llama_and_mistral_without_the_mark() -> None:
    expected = ("", [ToolCall("f", "{}")])
    assert LLAMA.parse('\n{"type": "function", "name": "f", "parameters": {}}') == expected
    assert LLAMA.parse('<|python_tag|>{"name": "f", "parameters": {}}') == expected
    assert MISTRAL.parse(' [{"name": "f", "arguments": {}}]') == expected
    later = 'So: {"name": "f", "parameters": {}}'
    assert LLAMA.parse(later) == (later, [])


def test_events_come_as_soon_as_they_are_certain() -> None:
    stream = HERMES.open_stream()
    assert stream.push("Hm <tool_") == [Text("Hm ")]
    assert stream.push("box> <tool_call>\n") == [Text("<tool_box> ")]
    assert stream.push('{"name": "f", "arguments": ') == []
    assert stream.push('{"a": "x') == [CallStarted(0, "f"), Arguments(0, '{"a": "x')]
    assert stream.push('}"}}\n</tool') == [Arguments(0, '}"}')]
    assert stream.push("_call>\n") == []
    assert stream.push("<tool_call>{nonsense") == [Text("\n<tool_call>"), Text("{nonsense")]
    assert stream.push("", last=True) == []
    plain = LLAMA.open_stream()
    assert plain.push('{"name": "Ada", "born"') == []
    assert plain.push(": 1815}") == [Text('{"name": "Ada", "born": 1815}')]
    assert plain.push("", last=True) == []


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<tool_", "[", "]", "{", "}", '"', "\\", ",", ";",
    ":", " ", "\n", '{"name": "f", ', '"arguments": ', '"parameters": ', "{}}", '{"a": "}\\"{", "b": [1, {"c": null}]}',
    '{"name": "g", "arguments": {"x": "日本 🎉"}}', '{"arguments": {}, "name": "h"}', '"id": "abc"', "text", "é", "1",
]  # fmt: skip
cuts = st.lists(st.integers(0, 300), max_size=40)
garbled = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=14).map("".join)


def stream_pieces(form: ToolFormat, text: str, places: list[int]) -> list[Event]:
    stream, events = form.open_stream(), list[Event]()
    borders = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    for start, end in pairwise(borders):
        events += stream.push(text[start:end])
    return events + stream.push("", last=True)


def check_events(events: list[Event]) -> None:
    """Calls are numbered from 0 in their order, and arguments belong to the call that started last."""
    started = -1
    for event in events:
        if isinstance(event, CallStarted):
            assert event.index == started + 1
            started = event.index
        elif isinstance(event, Arguments):
            assert event.index == started and event.text
        else:
            assert event.text


@each_format
@given(text=garbled, places=cuts)
@settings(max_examples=400, deadline=None)
def test_streamed_as_parsed_however_garbled(form: ToolFormat, text: str, places: list[int]) -> None:
    events = stream_pieces(form, text, places)
    check_events(events)
    free, calls = form.parse(text)
    assert join_events(events) == (free, calls)
    assert join_events(stream_pieces(form, text, list(range(len(text))))) == (free, calls)
    if not calls:
        assert free == text
    first = join_events(stream_pieces(form.single(), text, places))
    assert first == form.single().parse(text) == (free, calls[:1])


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
objects = st.dictionaries(st.text(), values, max_size=4)
names = st.text("abcXYZ019_.-", min_size=1, max_size=12)
prose = st.text("ab é🎉\n.,", max_size=12)


@each_format
@given(
    before=prose,
    calls=st.lists(st.tuples(names, objects), min_size=1, max_size=3),
    after=prose,
    escaped=st.booleans(),
    places=cuts,
)
@settings(max_examples=150, deadline=None)
def test_good_calls_are_found_in_any_cutting(
    form: ToolFormat, before: str, calls: list[tuple[str, Any]], after: str, escaped: bool, places: list[int]
) -> None:
    before = "" if form is LLAMA else before
    text = before + write(form, calls, lambda value: json.dumps(value, ensure_ascii=escaped)) + after
    free, found = join_events(stream_pieces(form, text, places))
    assert [(each.name, json.loads(each.arguments)) for each in found] == calls
    assert free == "".join(part for part in (before, after) if part.strip())


CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Oslo and Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [call("weather", '{"city": "Oslo"}', "call_1"), call("weather", '{"city": "Rome"}', "call_2")],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    {"role": "tool", "tool_call_id": "call_2", "content": "sun"},
]
CHATML_WITH_TOOLS = """\
{%- if tools %}<|im_start|>system
Tools:
{%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_template_of_hermes_kind() -> None:
    form = choose_format(CHATML_WITH_TOOLS)
    messages, shown = form.prepare(CHAT, TOOLS)
    text = ChatTemplate(CHATML_WITH_TOOLS, {}).render(messages, tools=shown, add_generation_prompt=True)
    listed = text.split("<|im_end|>")[0].splitlines()[2:]
    assert [json.loads(line)["function"]["parameters"] for line in listed] == [WEATHER, CLOCK]
    answer = text.split("<|im_start|>assistant\n")[1].split("<|im_end|>")[0]
    assert form.parse(answer) == ("", [ToolCall("weather", f'{{"city": "{city}"}}') for city in ("Oslo", "Rome")])
    assert "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>tool\nsun<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")
    assert CHAT[2]["content"] is None and CHAT[2]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'


@each_format
def test_no_tools_are_shown_for_none(form: ToolFormat) -> None:
    asked = CHAT[:2]
    assert form.prepare(asked, Tools(TOOLS.tools, "none")) == (asked, None)
    assert form.prepare(asked, None) == (asked, None)


def test_mistral_gets_ids_of_nine_characters() -> None:
    messages, shown = MISTRAL.prepare(CHAT, TOOLS)
    ids = [each["id"] for each in messages[2]["tool_calls"]]
    assert ids == [message["tool_call_id"] for message in messages[3:]] and len(set(ids)) == 2
    assert all(len(each) == 9 and each.isalnum() for each in ids)
    assert shown is not None and [tool["function"]["name"] for tool in shown] == ["weather", "clock.now"]
    kept = MISTRAL.prepare([{"role": "tool", "tool_call_id": "abcdefgh9", "content": ""}], None)[0]
    assert kept[0]["tool_call_id"] == "abcdefgh9"


def test_llama_gets_one_call_a_message() -> None:
    messages, _ = LLAMA.prepare(CHAT, TOOLS)
    assert [message["role"] for message in messages[2:]] == ["assistant", "tool", "assistant", "tool"]
    assert [message["tool_calls"][0]["function"]["arguments"]["city"] for message in messages[2::2]] == ["Oslo", "Rome"]
    assert [message["content"] for message in messages[3::2]] == ["rain", "sun"]


def test_a_template_without_tools_gets_text() -> None:
    messages, shown = DESCRIBED.prepare(CHAT, TOOLS)
    assert shown is None and [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert all(isinstance(message["content"], str) and "tool_calls" not in message for message in messages)
    assert messages[0]["content"].startswith("Be brief.\n\n")
    described = json.loads(messages[0]["content"].split("<tools>")[1].split("</tools>")[0])
    assert described[0] == {
        "type": "function",
        "function": {"name": "weather", "description": "Tells the weather.", "parameters": WEATHER},
    }
    assert [json.loads(each.arguments)["city"] for each in DESCRIBED.parse(messages[2]["content"])[1]] == [
        "Oslo",
        "Rome",
    ]
    assert messages[3]["content"] == ("<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>")
    assert [message["role"] for message in DESCRIBED.prepare(CHAT[1:2], TOOLS)[0]] == ["system", "user"]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return open_checkpoint(smollm2_path).tokenizer()


@pytest.fixture(scope="module")
def compiler(smollm2: Tokenizer) -> ConstraintCompiler:
    return ConstraintCompiler(smollm2, smollm2.size)


def accepts(compiler: ConstraintCompiler, grammar: str, text: str) -> bool:
    """Whether a model may write this text, token by token as the tokenizer cuts it, and end there."""
    matcher = compiler.open_matcher(Constraint("grammar", grammar))
    complete = False
    for token in compiler.tokenizer.encode(text, special=False):
        if complete or not matcher.allowed()[token]:
            return False
        complete = matcher.consume(token)
    return complete or bool(matcher.allowed()[sorted(compiler.tokenizer.eos_token_ids)].any())


OSLO, NOW = ("weather", {"city": "Oslo", "days": 2}), ("clock.now", {})
GOOD_CALLS: list[list[tuple[str, Any]]] = [[OSLO], [NOW], [("weather", {"city": '{"}]</tool_call>'})]]
WRONG_CALLS: list[tuple[str, Any]] = [
    ("wether", {"city": "Oslo"}),
    ("weather", {}),
    ("weather", {"city": ""}),
    ("weather", {"city": "Oslo", "days": "2"}),
    ("weather", {"city": "Oslo", "wind": 1}),
    ("clock.now", {"city": "Oslo"}),
    ("weather", "Oslo"),
]


@each_format
def test_grammar_takes_right_calls_only(form: ToolFormat, compiler: ConstraintCompiler) -> None:
    grammar, single = form.grammar(TOOLS), form.grammar(Tools(TOOLS.tools, "required", parallel=False))
    for calls in GOOD_CALLS:
        assert accepts(compiler, grammar, write(form, calls)), calls
        assert accepts(compiler, single, write(form, calls)), calls
    for wrong in WRONG_CALLS:
        assert not accepts(compiler, grammar, write(form, [wrong])), wrong
    spaced = write(form, [OSLO], lambda value: json.dumps(value, indent=1))
    assert not accepts(compiler, grammar, spaced)
    assert not accepts(compiler, grammar, "Hello")
    assert not accepts(compiler, grammar, "Hello " + write(form, [OSLO]))
    assert not accepts(compiler, grammar, write(form, [OSLO])[:-1])
    assert accepts(compiler, grammar, write(form, [OSLO, NOW, OSLO]))
    assert not accepts(compiler, single, write(form, [OSLO, NOW]))


@each_format
def test_grammar_of_a_named_tool(form: ToolFormat, compiler: ConstraintCompiler) -> None:
    grammar = form.grammar(Tools(TOOLS.tools, "clock.now"))
    assert accepts(compiler, grammar, write(form, [NOW]))
    assert not accepts(compiler, grammar, write(form, [OSLO]))


@pytest.mark.parametrize("special", [False, True])
def test_marks_that_are_tokens_are_asked_for_as_tokens(smollm2: Tokenizer, special: bool) -> None:
    backend = tokenizers.Tokenizer.from_str(smollm2.backend.to_str())
    marks = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]"]
    backend.add_tokens([tokenizers.AddedToken(mark, special=special, normalized=False) for mark in marks])
    tokenizer = Tokenizer(backend, smollm2.eos_token_ids)
    compiler = ConstraintCompiler(tokenizer, tokenizer.size)
    for template, plain in (("<tool_call>", HERMES), ("[TOOL_CALLS]", MISTRAL), ("", DESCRIBED)):
        form = choose_format(template, backend.token_to_id)
        assert accepts(compiler, form.grammar(TOOLS), write(plain, [OSLO, NOW]))
        assert not accepts(compiler, form.grammar(TOOLS), write(plain, [WRONG_CALLS[0]]))
