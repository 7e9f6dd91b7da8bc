"""/v1/messages as Anthropic's own client sees it, beside /v1/chat/completions; and what its bodies are said as."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import pytest
from anthropic.types import Message
from pydantic import BaseModel
from servers import RunningServer, serving
from tiny import make_tiny_model

from headrace.core import RowError
from headrace.job.tool_stream import Arguments, CallStarted, Event, Text
from headrace.server.message_body import read_message_body
from headrace.server.message_events import MessageWriter

pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::DeprecationWarning:anthropic")

ASK = [{"role": "user", "content": "What does the wheel grind?"}]
SCHEMA = {
    "type": "object",
    "properties": {"gate": {"type": "integer", "enum": [1, 2]}},
    "required": ["gate"],
    "additionalProperties": False,
}
TOOL = {"name": "open_gate", "description": "Open a gate of the mill", "input_schema": SCHEMA}
OTHER = {"name": "stop_wheel", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}
TALK = [
    *ASK,
    {"role": "user", "content": [{"type": "text", "text": "Say."}, {"type": "text", "text": "Now."}]},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "Let me see.", "citations": None},
            {"type": "tool_use", "id": "a", "name": "open_gate", "input": {"gate": 1}, "caller": {"type": "direct"}},
            {"type": "tool_use", "id": "b", "name": "open_gate", "input": {"gate": 2}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "open"}]},
            {"type": "tool_result", "tool_use_id": "b", "content": "stuck", "is_error": True},
            {"type": "text", "text": "Well?", "cache_control": {"type": "ephemeral"}},
        ],
    },
]


def chat_call(name: str, gate: int) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": "open_gate", "arguments": f'{{"gate": {gate}}}'}}


CHAT_TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What does the wheel grind?\nSay.\nNow."},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [chat_call("a", 1), chat_call("b", 2)]},
    {"role": "tool", "tool_call_id": "a", "content": "open"},
    {"role": "tool", "tool_call_id": "b", "content": "Error: stuck"},
    {"role": "user", "content": "Well?"},
]


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def client(server: RunningServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def fields(**changes: Any) -> dict[str, Any]:
    """A body; what the client's functions have no name for goes into extra_body."""
    return {"model": "tiny", "messages": ASK, "max_tokens": 24, "extra_body": {"seed": 7}} | changes


def chat(http: httpx.Client, **changes: Any) -> dict[str, Any]:
    body = {"messages": ASK, "max_tokens": 24, "seed": 7} | changes
    return dict(http.post("/v1/chat/completions", json=body).raise_for_status().json())


def join_text(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def watch(client: anthropic.Anthropic, **changes: Any) -> tuple[list[Any], Message]:
    """The raw events of an answer, each of which must be what its type says, and what the client makes of them."""
    raw = list(client.messages.create(**fields(stream=True, **changes)))
    for event in raw:
        type(event).model_validate(event.model_dump())
    with client.messages.stream(**fields(**changes)) as stream:
        return raw, stream.get_final_message()


def test_an_answer_is_that_of_chat_completions(http: httpx.Client, client: anthropic.Anthropic) -> None:
    message = client.messages.create(**fields())
    Message.model_validate(message.model_dump())
    expected = chat(http)
    assert message.id.startswith("msg_") and (message.model, message.role, message.type) == (
        "tiny",
        "assistant",
        "message",
    )
    assert join_text(message) == expected["choices"][0]["message"]["content"] != ""
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert message.usage.output_tokens == 24


def test_cached_tokens_count_apart(http: httpx.Client, client: anthropic.Anthropic) -> None:
    asked = [
        {"role": "user", "content": "A question that is long enough to fill a whole block of the cache, twice asked."}
    ]
    total = chat(http, messages=asked)["usage"]["prompt_tokens"]
    usage = client.messages.create(**fields(messages=asked)).usage
    assert usage.cache_read_input_tokens and usage.cache_read_input_tokens >= 16
    assert usage.cache_creation_input_tokens == 0
    assert usage.input_tokens + usage.cache_read_input_tokens == total
    _, streamed = watch(client, messages=asked)
    assert streamed.usage.input_tokens + (streamed.usage.cache_read_input_tokens or 0) == total


def test_a_stream_makes_the_plain_answer(client: anthropic.Anthropic) -> None:
    plain = client.messages.create(**fields())
    raw, streamed = watch(client)
    kinds = [event.type for event in raw]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert join_text(streamed) == join_text(plain)
    assert streamed.stop_reason == "max_tokens" and streamed.usage.output_tokens == 24
    assert raw[0].message.id.startswith("msg_") and raw[0].message.content == [] and raw[0].message.stop_reason is None


def test_events_are_named_and_begin_as_anthropics_do(http: httpx.Client) -> None:
    answer = http.post("/v1/messages", json={"messages": ASK, "max_tokens": 3, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [part.split("\n", 1) for part in answer.text.strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    assert names[:4] == ["message_start", "content_block_start", "ping", "content_block_delta"]
    assert names == [json.loads(data.removeprefix("data: "))["type"] for _, data in events]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "open_gate"}])
def test_a_call_that_must_be_made(client: anthropic.Anthropic, choice: dict[str, Any]) -> None:
    asked = {"tools": [TOOL, OTHER], "tool_choice": choice | {"disable_parallel_tool_use": True}, "max_tokens": 200}
    plain = client.messages.create(**fields(**asked))
    raw, streamed = watch(client, **asked)
    for message in (plain, streamed):
        (block,) = message.content
        assert block.type == "tool_use" and block.id.startswith("toolu_")
        assert block.name in ("open_gate", "stop_wheel") if choice["type"] == "any" else block.name == "open_gate"
        assert block.input in ({"gate": 1}, {"gate": 2})
        assert message.stop_reason == "tool_use"
    assert plain.content[0].model_dump(exclude={"id"}) == streamed.content[0].model_dump(exclude={"id"})
    pieces = [event.delta.partial_json for event in raw if event.type == "content_block_delta"]
    assert len(pieces) > 1 and json.loads("".join(pieces)) == plain.content[0].input


def test_a_talk_with_tools_goes_on(http: httpx.Client, client: anthropic.Anthropic) -> None:
    first = client.messages.create(**fields(tools=[TOOL], tool_choice={"type": "any"}, max_tokens=300))
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": "open"} for block in first.content]
    talk = [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = client.messages.create(**fields(messages=talk, tools=[TOOL], tool_choice={"type": "none"}))
    assert join_text(second) and second.stop_reason in ("end_turn", "max_tokens")


def test_the_clients_own_tool_runner(client: anthropic.Anthropic) -> None:
    gates: list[int] = []

    @anthropic.beta_tool
    def open_gate(gate: Literal[1, 2]) -> str:
        """Open a gate of the mill."""
        gates.append(gate)
        return "open"

    asked = fields(max_tokens=300, tool_choice={"type": "any"})
    runner = client.beta.messages.tool_runner(**asked, tools=[open_gate], max_iterations=2)
    assert [message.stop_reason for message in runner] == ["tool_use", "tool_use"]
    assert len(gates) >= 1


def test_a_stop_sequence_ends_the_answer_and_is_named(client: anthropic.Anthropic) -> None:
    text = join_text(client.messages.create(**fields()))
    stop = text[6:8]
    expected = text[: text.index(stop)]
    raw, streamed = watch(client, stop_sequences=["never said", stop])
    for message in (client.messages.create(**fields(stop_sequences=["never said", stop])), streamed):
        assert (join_text(message), message.stop_reason, message.stop_sequence) == (expected, "stop_sequence", stop)
    assert raw[-2].delta.stop_sequence == stop


def test_an_assistants_last_message_is_continued(http: httpx.Client, client: anthropic.Anthropic) -> None:
    talk = [*ASK, {"role": "assistant", "content": "The wheel grinds"}]
    expected = chat(http, messages=talk, continue_final_message=True, add_generation_prompt=False)
    message = client.messages.create(**fields(messages=talk))
    assert join_text(message) == expected["choices"][0]["message"]["content"]
    assert (
        message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == expected["usage"]["prompt_tokens"]
    )


class Gate(BaseModel):
    gate: bool


def test_a_schema_binds_the_answer(client: anthropic.Anthropic) -> None:
    answer = client.messages.parse(**fields(output_format=Gate, max_tokens=200))
    assert isinstance(answer.parsed_output, Gate)


def test_tokens_are_counted(http: httpx.Client, client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "tiny", "system": "Be short.", "messages": TALK, "tools": [TOOL]}
    count = client.messages.count_tokens(**asked).input_tokens
    function = {"name": "open_gate", "description": TOOL["description"], "parameters": SCHEMA}
    tools = [{"type": "function", "function": function}]
    assert count == chat(http, messages=CHAT_TALK, tools=tools, max_tokens=1)["usage"]["prompt_tokens"]
    long = [{"role": "user", "content": "x" * 3000}]
    assert client.messages.count_tokens(model="tiny", messages=long).input_tokens > 1024


def test_a_body_is_said_as_one_of_chat_completions() -> None:
    values = {
        "model": "m", "max_tokens": 9, "system": [{"type": "text", "text": "Be short."}], "messages": TALK,
        "temperature": 0.5, "top_p": 0.9, "top_k": 4, "stop_sequences": ["END"], "stream": True,
        "tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "metadata": {"user_id": "me"}, "service_tier": "standard_only", "thinking": {"type": "disabled"},
        "cache_control": {"type": "ephemeral"}, "seed": 3, "priority": -1,
    }  # fmt: skip
    asked = read_message_body(values, "error")
    function = {"name": "open_gate", "description": TOOL["description"], "parameters": SCHEMA, "strict": False}
    assert asked.stream and not asked.warnings
    assert asked.body == {
        "messages": CHAT_TALK, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "stop": ["END"],
        "seed": 3, "tools": [{"type": "function", "function": function}], "tool_choice": "required",
        "parallel_tool_calls": False,
    }  # fmt: skip


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


RESULT = {"type": "tool_result", "tool_use_id": "a"}
REFUSED = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": 1.5}, "temperature"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    (user({"type": "image", "source": {}}), "messages[0].content[0]"),
    (user(RESULT), "messages[0].content[0].tool_use_id"),
    (user({"type": "text", "text": "x"}, RESULT), "messages[0].content"),
    (user({"type": "text", "text": "x", "tone": "mild"}), "messages[0].content[0].tone"),
    ({"messages": [*ASK, {"role": "assistant", "content": "ends with space "}]}, "messages[1]"),
    ({"messages": TALK[:3]}, "messages[2]"),
    ({"system": [{"type": "image"}]}, "system[0]"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "a b"}]}, "tools[0].name"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    ({"tools": [TOOL | {"input_schema": {"type": "array"}}]}, "tools[0].input_schema.type"),
    ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "fly"}}, "tool_choice.name"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ({"output_config": {"effort": "high"}}, "output_config.effort"),
    ({"metadata": {"team": "mill"}}, "metadata.team"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"thread": {"type": "create"}}, "thread"),
    ({"n": 2}, "n"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_done_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RowError) as caught:
        read_message_body({"messages": ASK, "max_tokens": 9} | changes, "error")
    assert str(caught.value).split(" ")[0].rstrip(":,") == named


def test_unknown_fields_can_be_let_pass() -> None:
    body = {"messages": ASK, "max_tokens": 9, "thinking": {"type": "enabled"}, "mcp_servers": []}
    asked = read_message_body(body, "warn")
    assert asked.warnings == ("thinking: not supported, ignored", "mcp_servers: not supported, ignored")
    assert read_message_body(body, "ignore").warnings == ()


def write(*events: Event) -> tuple[MessageWriter, list[dict[str, Any]]]:
    writer = MessageWriter("msg_1")
    told = [each for event in events for each in writer.write(event)]
    return writer, [*told, *writer.close()]


def test_words_and_calls_are_blocks_in_their_order() -> None:
    writer, told = write(
        Text("See"), Text(":"), CallStarted(0, "f"), Arguments(0, '{"a":'), Arguments(0, " 1}"), Text("Done."),
    )  # fmt: skip
    first, call, last = writer.content
    assert (first["text"], call["name"], call["input"], last["text"]) == ("See:", "f", {"a": 1}, "Done.")
    assert writer.calls
    indices = [each["index"] for each in told if each["type"] != "ping"]
    assert indices == sorted(indices) and [each["type"] for each in told].count("ping") == 1
    assert [each["type"] for each in told if each.get("index") == 1] == [
        "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", ['{"a": [1', "{a: 1}", ""])
def test_a_call_that_broke_off_is_text(arguments: str) -> None:
    writer, _ = write(CallStarted(0, "f"), Arguments(0, arguments))
    assert writer.content == [{"type": "text", "text": '{"name": "f", "arguments": ' + arguments}]
    assert not writer.calls


def test_errors_have_anthropics_form(http: httpx.Client, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**fields(extra_body={"temperature": 1, "top_p": 7}))
    error = caught.value.body
    assert isinstance(error, dict) and error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error" and "top_p" in error["error"]["message"]
    with pytest.raises(anthropic.NotFoundError, match="'other' is not served here"):
        client.messages.create(**fields(model="other"))
    with pytest.raises(anthropic.BadRequestError, match="context"):
        client.messages.create(**fields(max_tokens=5000))
    assert http.get("/v1/messages").json()["error"]["type"] == "invalid_request_error"


def test_an_error_in_a_stream_is_an_event(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "long", max_position_embeddings=20000)
    with serving(model, "--data", str(tmp_path / "data"), "--request-timeout", "1") as running:
        client = anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)
        asked = fields(max_tokens=19000, stream=True, extra_body={"ignore_eos": True})
        stream = client.messages.create(**asked | {"model": "long"})
        with pytest.raises(anthropic.APIStatusError, match="longer than 1 s"):
            list(stream)
        body = {"messages": ASK, "max_tokens": 19000, "stream": True, "ignore_eos": True}
        with running.client() as http:
            answer = http.post("/v1/messages", json=body)
    name, data = answer.text.strip().split("\n\n")[-1].split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error",
        "error": {
            "type": "api_error",
            "message": "the request took longer than 1 s",
            "details": {"error_code": "timeout"},
        },
    }
