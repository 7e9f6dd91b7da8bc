"""Tools in every form of chat, of a model that writes two calls where one may be enough."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jobs import batch_row, read_lines, run, write_lines
from servers import serving
from tiny import CHAT_TEMPLATE, make_tiny_model

ASK = [{"role": "user", "content": "Open both gates."}]
SCHEMA = {"type": "object", "properties": {"gate": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "open_gate", "parameters": SCHEMA}}]
# The template is one of Mistral's, for which a list of calls is calls: so a schema makes this model write two.
CALLS = [{"name": "open_gate", "arguments": {"gate": gate}} for gate in (1, 2)]
FORM = {"type": "json_schema", "schema": {"enum": [CALLS]}}
CHAT_FORM = {"type": "json_schema", "json_schema": {"name": "calls", "schema": FORM["schema"]}}


def chat(parallel: bool) -> dict[str, Any]:
    return {"messages": ASK, "tools": TOOLS, "response_format": CHAT_FORM, "parallel_tool_calls": parallel}


def respond(parallel: bool) -> dict[str, Any]:
    tool = {"type": "function", "name": "open_gate", "parameters": SCHEMA}
    return {"input": ASK, "tools": [tool], "text": {"format": FORM}, "parallel_tool_calls": parallel}


def message(parallel: bool) -> dict[str, Any]:
    tool, choice = {"name": "open_gate", "input_schema": SCHEMA}, {"disable_parallel_tool_use": not parallel}
    body = {"messages": ASK, "tools": [tool], "output_config": {"format": FORM}, "max_tokens": 500}
    return body | {"tool_choice": {"type": "auto"} | choice}


def read_chat(answer: dict[str, Any]) -> list[Any]:
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    return [json.loads(call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]


def read_response(answer: dict[str, Any]) -> list[Any]:
    assert answer["status"] == "completed" and {item["type"] for item in answer["output"]} == {"function_call"}
    return [json.loads(item["arguments"]) for item in answer["output"]]


def read_message(answer: dict[str, Any]) -> list[Any]:
    assert answer["stop_reason"] == "tool_use" and {block["type"] for block in answer["content"]} == {"tool_use"}
    return [block["input"] for block in answer["content"]]


FORMS = {
    "/v1/chat/completions": (chat, read_chat),
    "/v1/responses": (respond, read_response),
    "/v1/messages": (message, read_message),
}


def join_arguments(events: list[dict[str, Any]]) -> list[Any]:
    """The arguments of the calls in a stream of any form."""
    pieces: dict[int, str] = {}
    for event in events:
        for choice in event.get("choices", ()):
            for call in choice["delta"].get("tool_calls", ()):
                pieces[call["index"]] = pieces.get(call["index"], "") + call["function"]["arguments"]
        if event.get("type") == "response.function_call_arguments.delta":
            place, text = event["output_index"], event["delta"]
            pieces[place] = pieces.get(place, "") + text
        if event.get("type") == "content_block_delta":
            place, text = event["index"], event["delta"]["partial_json"]
            pieces[place] = pieces.get(place, "") + text
    return [json.loads(text) for text in pieces.values()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    path = folder / "tokenizer_config.json"
    template = CHAT_TEMPLATE + "{# [TOOL_CALLS] #}{% if tools %}{{ tools }}{% endif %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def client(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(model, "--data", str(tmp_path_factory.mktemp("data"))) as server, server.client() as found:
        yield found


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize(("parallel", "gates"), [(True, [{"gate": 1}, {"gate": 2}]), (False, [{"gate": 1}])])
def test_an_answer_has_one_call_where_several_are_not_wanted(
    client: httpx.Client, path: str, parallel: bool, gates: list[Any]
) -> None:
    make, read = FORMS[path]
    plain = client.post(path, json=make(parallel))
    assert plain.status_code == 200, plain.text
    assert read(plain.json()) == gates
    lines = client.post(path, json=make(parallel) | {"stream": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert join_arguments(events) == gates


def test_rows_that_differ_in_nothing_else_are_answered_apart(model: Path, tmp_path: Path) -> None:
    bodies = [chat(parallel) | {"temperature": 0, "max_tokens": 500} for parallel in (True, False, True)]
    rows = [batch_row(str(place), "", **body) for place, body in enumerate(bodies)]
    report = run(model, write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    answers = [line["response"]["body"] for line in read_lines(tmp_path / "out.jsonl")]
    assert [len(read_chat(answer)) for answer in answers] == [2, 1, 2]
    assert report["rows_shared"] == 1


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"functions": [TOOLS[0]["function"]]}, "tools"),
        ({"functions": [TOOLS[0]["function"]], "function_call": {"name": "open_gate"}}, "tools"),
        ({"function_call": {"name": "open_gate"}}, "tool_choice"),
    ],
)
def test_the_older_form_of_tools_is_refused_and_the_newer_is_named(
    client: httpx.Client, fields: dict[str, Any], word: str
) -> None:
    found = client.post("/v1/chat/completions", json={"messages": ASK, **fields})
    assert found.status_code == 400 and found.json()["error"]["code"] == "unsupported_field"
    assert found.json()["error"]["message"].endswith(f"say it with {word}")


def test_an_older_form_that_asks_for_no_tools_is_harmless(client: httpx.Client) -> None:
    body = {"messages": ASK, "max_tokens": 2, "functions": [], "function_call": "auto"}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("name", [[], {}, 1, "close_gate"])
def test_a_choice_of_no_tool_is_refused(client: httpx.Client, name: Any) -> None:
    choice = {"type": "function", "function": {"name": name}}
    found = client.post("/v1/chat/completions", json={"messages": ASK, "tools": TOOLS, "tool_choice": choice})
    assert found.status_code == 400 and found.json()["error"]["param"] == "tool_choice.function.name"


def test_tokens_are_those_that_a_chat_counts(client: httpx.Client) -> None:
    body = {"messages": ASK, "tools": TOOLS, "max_tokens": 2, "stream": False}
    counts = []
    for change in ({}, {"tool_choice": "none"}, {"tools": None}, {"add_generation_prompt": False}):
        found = client.post("/tokenize", json=body | change).json()
        answer = client.post("/v1/chat/completions", json=body | change).json()
        assert found["count"] == len(found["tokens"]) == answer["usage"]["prompt_tokens"]
        counts.append(found["count"])
    assert counts[0] > counts[1] == counts[2] and counts[0] > counts[3]
    shown = client.post("/detokenize", json={"tokens": client.post("/tokenize", json=body).json()["tokens"]}).json()
    assert "open_gate" in shown["prompt"] and "Open both gates." in shown["prompt"]
    wrong = client.post("/tokenize", json=body | {"wheels": 1})
    assert wrong.status_code == 400 and "wheels" in wrong.json()["error"]["message"]
