"""/v1/responses as OpenAI's own client sees it, beside /v1/chat/completions; and what its bodies are said as."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel
from servers import RunningServer, serving
from tiny import make_tiny_model

from headrace.core import RowError
from headrace.job.tool_stream import Arguments, CallStarted, Event, Text
from headrace.server.response_body import read_response_body
from headrace.server.response_events import ResponseWriter

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

ASK = "What does the wheel grind?"
SCHEMA = {
    "type": "object",
    "properties": {"gate": {"type": "integer", "enum": [1, 2]}},
    "required": ["gate"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "open_gate", "description": "Open a gate", "parameters": SCHEMA, "strict": True}
OTHER = {"type": "function", "name": "stop_wheel", "parameters": SCHEMA}
TALK: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be kind."},
    {"role": "user", "content": [{"type": "input_text", "text": "What"}, {"type": "input_text", "text": "grinds?"}]},
    {
        "type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
        "content": [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}],
    },
    {"type": "function_call", "id": "fc_1", "call_id": "a", "name": "open_gate", "arguments": '{"gate": 1}'},
    {"type": "function_call", "call_id": "b", "name": "open_gate", "arguments": '{"gate": 2}'},
    {"type": "function_call_output", "call_id": "a", "output": "open"},
    {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "stuck"}]},
    {"role": "user", "content": "Well?"},
    {"role": "user", "content": "Now."},
]  # fmt: skip


def chat_call(name: str, gate: int) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": "open_gate", "arguments": f'{{"gate": {gate}}}'}}


CHAT_TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "developer", "content": "Be kind."},
    {"role": "user", "content": "What\ngrinds?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [chat_call("a", 1), chat_call("b", 2)]},
    {"role": "tool", "tool_call_id": "a", "content": "open"},
    {"role": "tool", "tool_call_id": "b", "content": "stuck"},
    {"role": "user", "content": "Well?"},
    {"role": "user", "content": "Now."},
]


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def fields(**changes: Any) -> dict[str, Any]:
    """A body; what the client's functions have no name for goes into extra_body."""
    return {"model": "tiny", "input": ASK, "max_output_tokens": 24, "extra_body": {"seed": 7}} | changes


def chat(http: httpx.Client, **changes: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": ASK}], "max_tokens": 24, "seed": 7} | changes
    return dict(http.post("/v1/chat/completions", json=body).raise_for_status().json())


def watch(client: openai.OpenAI, **changes: Any) -> tuple[list[Any], Response]:
    """The events of an answer, each of which must be what its type says, and the response in the last one."""
    events = list(client.responses.create(**fields(stream=True, **changes)))
    for event in events:
        type(event).model_validate(event.model_dump())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == f"response.{events[-1].response.status}"
    assert events[0].response.id == events[-1].response.id and events[0].response.output == []
    return events, events[-1].response


def test_an_answer_is_that_of_chat_completions(http: httpx.Client, client: openai.OpenAI) -> None:
    response = client.responses.create(
        **fields(user="me", metadata={"mill": "1"}, service_tier="auto", temperature=0.5)
    )
    Response.model_validate(response.model_dump())
    expected = chat(http, temperature=0.5)
    assert response.output_text == expected["choices"][0]["message"]["content"] != ""
    assert response.id.startswith("resp_") and (response.object, response.model) == ("response", "tiny")
    assert response.incomplete_details is not None
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage is not None
    assert response.usage.input_tokens == expected["usage"]["prompt_tokens"]
    assert (response.usage.output_tokens, response.usage.total_tokens) == (24, response.usage.input_tokens + 24)
    assert response.usage.input_tokens_details.cached_tokens % 16 == 0
    told = (response.user, response.metadata, response.service_tier, response.temperature, response.max_output_tokens)
    assert told == ("me", {"mill": "1"}, "default", 0.5, 24)


def test_a_stream_makes_the_plain_answer(client: openai.OpenAI) -> None:
    plain = client.responses.create(**fields())
    events, streamed = watch(client)
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[2:4] == ["output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == streamed.output_text == plain.output_text == events[-4].text
    item = streamed.output[0]
    assert item.type == "message" and item.status == "incomplete"
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {item.id}


def test_the_clients_own_stream_reader(client: openai.OpenAI) -> None:
    asked = fields(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_output_tokens=200)
    with client.responses.stream(**asked) as stream:
        response = stream.get_final_response()
    (call,) = response.output
    assert call.type == "function_call" and call.parsed_arguments in ({"gate": 1}, {"gate": 2})


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "open_gate"}])
def test_a_call_that_must_be_made(client: openai.OpenAI, choice: Any) -> None:
    asked = {"tools": [TOOL, OTHER], "tool_choice": choice, "parallel_tool_calls": False, "max_output_tokens": 200}
    plain = client.responses.create(**fields(**asked))
    events, streamed = watch(client, **asked)
    for response in (plain, streamed):
        (call,) = response.output
        assert call.type == "function_call" and call.status == "completed" and call.call_id.startswith("call_")
        assert call.name in ("open_gate", "stop_wheel") if choice == "required" else call.name == "open_gate"
        assert json.loads(call.arguments) in ({"gate": 1}, {"gate": 2})
        assert (response.status, response.incomplete_details) == ("completed", None)
    assert plain.output[0].arguments == streamed.output[0].arguments
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 1 and "".join(deltas) == streamed.output[0].arguments
    assert [tool.name for tool in plain.tools] == ["open_gate", "stop_wheel"] and plain.tools[0].strict


def test_a_talk_with_tools_goes_on(client: openai.OpenAI) -> None:
    first = client.responses.create(**fields(tools=[TOOL], tool_choice="required", max_output_tokens=300))
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "open"} for call in first.output]
    talk: Any = [{"role": "user", "content": ASK}, *first.output, *results]
    second = client.responses.create(**fields(input=talk, tools=[TOOL], tool_choice="none"))
    assert second.output_text
    third = client.responses.create(**fields(input=[*talk, *second.output, {"role": "user", "content": "And?"}]))
    assert third.output_text and third.usage.input_tokens > second.usage.output_tokens


def test_log_probabilities_are_those_of_chat_completions(http: httpx.Client, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    expected = chat(http, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    plain = client.responses.create(**fields(**asked))
    events, streamed = watch(client, **asked)
    for response in (plain, streamed):
        (part,) = response.output[0].content
        assert [each.token for each in part.logprobs] == [each["token"] for each in expected]
        assert [each.logprob for each in part.logprobs] == pytest.approx(
            [each["logprob"] for each in expected], abs=1e-4
        )
        assert all(len(each.top_logprobs) == 2 for each in part.logprobs)
    told = [each.token for event in events if event.type == "response.output_text.delta" for each in event.logprobs]
    assert told == [each["token"] for each in expected]


class Gate(BaseModel):
    gate: bool


def test_a_schema_binds_the_answer(client: openai.OpenAI) -> None:
    response = client.responses.parse(**fields(text_format=Gate, max_output_tokens=200))
    assert isinstance(response.output_parsed, Gate)
    assert response.text is not None and response.text.format is not None and response.text.format.type == "json_schema"


def test_a_stop_text_ends_the_answer(client: openai.OpenAI) -> None:
    text = client.responses.create(**fields()).output_text
    stopped = client.responses.create(**fields(extra_body={"seed": 7, "stop": text[6:8]}))
    assert (stopped.output_text, stopped.status) == (text[: text.index(text[6:8])], "completed")


def test_a_body_is_said_as_one_of_chat_completions() -> None:
    values = {
        "model": "m", "instructions": "Be short.", "input": TALK, "max_output_tokens": 9, "temperature": 0.5,
        "top_p": 0.9, "stream": True, "stream_options": {"include_obfuscation": False}, "store": False,
        "background": False,
        "text": {"format": {"type": "json_schema", "name": "gate", "schema": SCHEMA, "strict": True}},
        "tools": [TOOL], "tool_choice": {"type": "function", "name": "open_gate"}, "parallel_tool_calls": False,
        "metadata": {}, "user": "me", "reasoning": {"effort": "none", "summary": None}, "truncation": "disabled",
        "include": ["message.output_text.logprobs", "reasoning.encrypted_content"], "top_logprobs": 3,
        "service_tier": "flex", "prompt_cache_key": "k", "previous_response_id": None, "max_tool_calls": 2,
        "safety_identifier": "s", "seed": 3, "top_k": 4, "stop": "END",
    }  # fmt: skip
    asked = read_response_body(values, "error")
    function = {"name": "open_gate", "description": "Open a gate", "parameters": SCHEMA, "strict": True}
    assert asked.stream and not asked.warnings
    assert asked.body == {
        "messages": CHAT_TALK, "max_completion_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3, "top_k": 4,
        "stop": "END", "logprobs": True, "top_logprobs": 3, "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "open_gate"}},
    }  # fmt: skip


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": list(parts)}]}


RESULT = {"type": "function_call_output", "call_id": "a", "output": "open"}
REFUSED = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
    ({"input": [RESULT]}, "input[0].call_id"),
    ({"input": [TALK[3] | {"arguments": "[]"}]}, "input[0].arguments"),
    (user({"type": "input_image", "image_url": "x"}), "input[0].content[0]"),
    (user({"type": "input_text"}), "input[0].content[0].text"),
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["reasoning.encrypted_content", "file_search_call.results"]}, "include[1]"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "fly"}}, "tool_choice.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"user": 3}, "user"),
    ({"context_management": []}, "context_management"),
    ({"n": 2}, "n"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_done_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RowError) as caught:
        read_response_body({"input": ASK} | changes, "error")
    assert str(caught.value).split(" ")[0].rstrip(":,") == named


def test_reasoning_that_is_not_there_may_be_asked_for() -> None:
    asked = read_response_body({"input": ASK, "include": ["reasoning.encrypted_content"]}, "error")
    assert asked.body == {"messages": [{"role": "user", "content": ASK}]} and not asked.warnings
    with pytest.raises(RowError, match="top_logprobs needs include"):
        read_response_body({"input": ASK, "include": ["reasoning.encrypted_content"], "top_logprobs": 2}, "error")


def test_unknown_fields_can_be_let_pass() -> None:
    body = {"input": ASK, "reasoning": {"effort": "high"}}
    assert read_response_body(body, "warn").warnings == ("reasoning.effort: not supported, ignored",)
    assert read_response_body(body, "ignore").warnings == ()
    with pytest.raises(RowError, match="nothing is stored"):
        read_response_body(body | {"store": True}, "ignore")


def write(*events: Event, whole: bool = True) -> tuple[ResponseWriter, list[dict[str, Any]]]:
    writer = ResponseWriter("resp_1")
    told = [each for event in events for each in writer.write(event)]
    return writer, [*told, *writer.finish(whole)]


def test_words_and_calls_are_items_in_their_order() -> None:
    writer, told = write(
        Text("See"), Text(":"), CallStarted(0, "f"), Arguments(0, '{"a":'), Arguments(0, " 1}"), Text("Do"), whole=False
    )
    first, call, last = writer.output
    assert (first["content"][0]["text"], call["arguments"], last["content"][0]["text"]) == ("See:", '{"a": 1}', "Do")
    assert [item["status"] for item in writer.output] == ["completed", "completed", "incomplete"]
    assert len({item["id"] for item in writer.output}) == 3
    places = [each["output_index"] for each in told]
    assert places == sorted(places) and [each["sequence_number"] for each in told] == list(range(len(told)))
    assert [each["type"].removeprefix("response.") for each in told if each["output_index"] == 1] == [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
    ]  # fmt: skip


def test_an_empty_answer_is_an_empty_message() -> None:
    writer, told = write()
    assert [(item["type"], item["content"][0]["text"]) for item in writer.output] == [("message", "")]
    assert "response.output_text.delta" not in [each["type"] for each in told]


def test_errors_have_openais_form(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**fields(previous_response_id="resp_1"))
    assert (caught.value.code, caught.value.param) == ("unsupported_field", "previous_response_id")
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(**fields(model="other"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(**fields(max_output_tokens=5000))
    assert long.value.code == "context_length_exceeded"


def test_an_error_in_a_stream_is_a_failed_response(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "long", max_position_embeddings=20000)
    with serving(model, "--data", str(tmp_path / "data"), "--request-timeout", "1") as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        events, response = watch(client, model="long", max_output_tokens=19000, extra_body={"ignore_eos": True})
    assert events[-1].type == "response.failed" and response.error is not None
    assert (response.error.code, response.error.message) == ("server_error", "the request took longer than 1 s")
    assert response.output_text
