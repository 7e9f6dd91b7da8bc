"""The server as clients see it: OpenAI's own client, streams, structured output, tools, errors, limits, endings."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import signal
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from jobs import batch_row, engine_options, read_lines, run, write_lines
from servers import RunningServer, serving
from tiny import make_tiny_model

from headrace.checkpoint import open_checkpoint
from headrace.core import HeadraceError, Request, SamplingParams
from headrace.engine.memory import read_available_bytes
from headrace.llm import LLM
from headrace.options import EngineOptions, SamplingOptions, ServeOptions
from headrace.server.exchange import Exchange
from headrace.server.keys import Key, add_key
from headrace.server.models import Models
from headrace.server.pace import Pace
from headrace.server.service import Service
from headrace.server.turns import Turns
from headrace.server.worker import Worker

ASK = [{"role": "user", "content": "What does the wheel grind?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "open_gate",
        "description": "Open a gate of the mill",
        "parameters": {
            "type": "object",
            "properties": {"gate": {"type": "integer", "enum": [1, 2]}},
            "required": ["gate"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


@pytest.fixture(scope="module")
def assistant(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat(assistant: openai.OpenAI, **fields: Any) -> Any:
    return assistant.chat.completions.create(**({"model": "tiny", "messages": ASK, "max_tokens": 12} | fields))


def join(stream: Any) -> dict[int, str]:
    """The text of each choice of a stream."""
    texts: dict[int, str] = {}
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return texts


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"seed": 7},
        {"seed": 7, "n": 3, "top_p": 0.9},
        {"temperature": 0, "stop": ["e", "zz"]},
        {"temperature": 0, "logprobs": True, "top_logprobs": 2},
    ],
)
def test_a_stream_says_what_a_plain_answer_says(assistant: openai.OpenAI, fields: dict[str, Any]) -> None:
    plain = chat(assistant, **fields)
    events = list(chat(assistant, **fields, stream=True, stream_options={"include_usage": True}))
    assert join(events) == {choice.index: choice.message.content for choice in plain.choices}
    ends = {c.index: c.finish_reason for event in events for c in event.choices if c.finish_reason}
    assert ends == {choice.index: choice.finish_reason for choice in plain.choices}
    assert events[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert events[-1].usage.prompt_tokens == plain.usage.prompt_tokens
    if "logprobs" in fields:
        said = [token.logprob for event in events for c in event.choices if c.logprobs for token in c.logprobs.content]
        assert said == pytest.approx([token.logprob for token in plain.choices[0].logprobs.content], abs=1e-5)


def test_the_answer_is_that_of_a_job(assistant: openai.OpenAI, tiny_model: Path, tmp_path: Path) -> None:
    settings = {"seed": 11, "temperature": 0.8, "max_tokens": 12}
    source = write_lines(tmp_path / "in.jsonl", [batch_row("a", ASK[0]["content"], **settings)])
    run(tiny_model, source, tmp_path / "out.jsonl")
    (line,) = read_lines(tmp_path / "out.jsonl")
    said = line["response"]["body"]["choices"][0]["message"]["content"]
    assert chat(assistant, **settings).choices[0].message.content == said


def test_requests_with_different_seeds_differ_and_without_one_too(assistant: openai.OpenAI) -> None:
    texts = [
        chat(assistant, **({"seed": seed} if seed else {})).choices[0].message.content for seed in (1, 2, None, None)
    ]
    assert len(set(texts)) == 4


def test_a_schema_forces_the_form(assistant: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"]}
    form = {
        "type": "json_schema",
        "json_schema": {"name": "verdict", "schema": schema | {"additionalProperties": False}},
    }
    answer = chat(assistant, response_format=form, max_tokens=40, seed=3)
    assert isinstance(json.loads(answer.choices[0].message.content)["good"], bool)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "open_gate"}}])
def test_a_tool_that_must_be_called_is_called(assistant: openai.OpenAI, choice: Any) -> None:
    fields = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200, "seed": 5}
    plain = chat(assistant, **fields)
    (call,) = plain.choices[0].message.tool_calls
    assert plain.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "open_gate"
    assert json.loads(call.function.arguments)["gate"] in (1, 2)
    name, arguments, ended = "", "", None
    for event in chat(assistant, **fields, stream=True):
        for delta in event.choices[0].delta.tool_calls or []:
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
        ended = event.choices[0].finish_reason or ended
    assert (name, arguments, ended) == ("open_gate", call.function.arguments, "tool_calls")
    messages = [*ASK, plain.choices[0].message.model_dump(exclude_none=True)]
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "it is open"})
    assert chat(assistant, messages=messages, tools=[TOOL], tool_choice="none").choices[0].message.tool_calls is None


def test_completions_take_texts_and_tokens_and_echo_their_scores(assistant: openai.OpenAI, tiny_model: Path) -> None:
    with LLM(str(tiny_model), precision="fp32", block_size=16, kv_cache_bytes=4 << 20, threads=1) as llm:
        (expected,) = llm.score("The wheel turns")
        tokens = llm.tokenizer.encode("The wheel turns")
    create = assistant.completions.create
    answer = create(model="tiny", prompt=["The wheel turns", "Water"], max_tokens=3, temperature=0, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert create(model="tiny", prompt=tokens, max_tokens=3, temperature=0).choices[0].text == answer.choices[0].text
    for count in (0, 3):
        scored = create(model="tiny", prompt=tokens, max_tokens=count, temperature=0, echo=True, logprobs=1).choices[0]
        found = scored.logprobs.token_logprobs
        assert len(found) == len(tokens) + count and found[0] is None
        assert found[1 : len(tokens)] == pytest.approx(expected.logprobs[1:], abs=1e-4)
        assert "".join(scored.logprobs.tokens[: len(tokens)]) == "The wheel turns"
        assert scored.logprobs.text_offset[:2] == [0, len(scored.logprobs.tokens[0])]
        assert all(
            max(top.values()) >= own - 1e-5
            for top, own in zip(scored.logprobs.top_logprobs[1:], found[1:], strict=True)
        )


def count_hits(client: httpx.Client) -> float:
    """Prompt tokens that were found in the prefix cache so far."""
    found = re.search(r"^headrace_prefix_cache_hit_tokens_total\S* (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_a_prompt_that_is_scored_and_continued_is_computed_once(client: httpx.Client) -> None:
    before = count_hits(client)
    body = {"prompt": list(range(5, 69)), "max_tokens": 2, "ignore_eos": True, "echo": True, "logprobs": 1}
    said = client.post("/v1/completions", json=body).json()
    assert len(said["choices"][0]["logprobs"]["tokens"]) == 64 + 2
    assert said["usage"]["prompt_tokens"] == 64 and said["usage"]["completion_tokens"] == 2
    assert said["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    # All blocks of 16 but the last, of which a token must be computed.
    assert count_hits(client) - before == 48


def test_a_completion_streams(assistant: openai.OpenAI) -> None:
    fields = {"model": "tiny", "prompt": "Water", "max_tokens": 9, "seed": 4, "echo": True}
    plain = assistant.completions.create(**fields)
    stream = assistant.completions.create(**fields, stream=True)
    assert "".join(event.choices[0].text for event in stream) == plain.choices[0].text


@pytest.mark.parametrize("streamed", [False, True])
def test_echo_alone_generates_nothing_and_counts_the_prompt(client: httpx.Client, streamed: bool) -> None:
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 0, "echo": True, "n": 2}
    if not streamed:
        found = client.post("/v1/completions", json=body).json()
        choices, usage = found["choices"], found["usage"]
    else:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        lines = [line for line in client.post("/v1/completions", json=body).text.splitlines() if line]
        assert lines.pop() == "data: [DONE]"
        *events, last = (json.loads(line.removeprefix("data: ")) for line in lines)
        assert all(event["usage"] is None for event in events) and last["choices"] == []
        choices, usage = [choice for event in events for choice in event["choices"]], last["usage"]
    text = client.post("/detokenize", json={"tokens": body["prompt"]}).json()["prompt"]
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in choices] == [
        (0, text, "length"),
        (1, text, "length"),
    ]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 0, 4)


def test_embeddings_are_those_of_the_model(assistant: openai.OpenAI, client: httpx.Client, tiny_model: Path) -> None:
    texts = ["The wheel turns", "Water comes down the headrace"]
    with LLM(str(tiny_model), precision="fp32", block_size=16, kv_cache_bytes=4 << 20, threads=1) as llm:
        expected = llm.embed(texts)
    found = assistant.embeddings.create(model="tiny", input=texts)
    for vector, right in zip(found.data, expected, strict=True):
        assert vector.embedding == pytest.approx(right, abs=1e-5)
        assert sum(value**2 for value in vector.embedding) == pytest.approx(1, abs=1e-4)
    body = {"input": texts[0], "encoding_format": "base64", "dimensions": 8}
    data = client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    short = struct.unpack("<8f", base64.b64decode(data))
    assert sum(value**2 for value in short) == pytest.approx(1, abs=1e-4)
    assert short[0] / short[1] == pytest.approx(expected[0][0] / expected[0][1], rel=1e-4)


def test_tokens_go_out_and_come_back(client: httpx.Client) -> None:
    found = client.post("/tokenize", json={"prompt": "The wheel turns"}).json()
    assert found["count"] == len(found["tokens"])
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "The wheel turns"}
    assert client.post("/tokenize", json={"messages": ASK}).json()["count"] > 0


def test_special_tokens_are_told(client: httpx.Client, tiny_model: Path) -> None:
    told = client.get("/tokenizer_info").json()
    assert client.get("/tokenizer_info", params={"model": "tiny"}).json() == told
    assert client.get("/tokenizer_info", params={"model": "other"}).status_code == 404
    tokenizer = open_checkpoint(tiny_model).tokenizer()
    assert told["chat_template"] == tokenizer.chat_template
    assert tokenizer.encode(told["eos_token"], special=False) == [min(tokenizer.eos_token_ids)]


def test_small_routes_answer(client: httpx.Client, assistant: openai.OpenAI) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").status_code == 200
    assert [model.id for model in assistant.models.list().data] == ["tiny"]
    assert assistant.models.retrieve("tiny").id == "tiny"
    chat(assistant)
    assert 'headrace_time_to_first_token_seconds_count{model="tiny"}' in client.get("/metrics").text
    stats = client.get("/stats").json()
    assert stats["models"][0]["name"] == "tiny" and stats["now"]["finished"] > 0


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"messages": ASK, "model": "other"}, 404, "model_not_found", "model"),
        ({"messages": ASK, "temperature": 900}, 400, "invalid_value", None),
        ({"messages": ASK, "max_tokens": 5000}, 400, "context_length_exceeded", None),
        ({"messages": []}, 400, "missing_field", None),
        ({"messages": ASK, "colour": "red"}, 400, "unknown_field", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "unsupported_content", None),
        ({"messages": ASK, "stream": "yes"}, 400, "invalid_value", "stream"),
        ({"messages": ASK, "stream": True, "stream_options": {"pace": 1}}, 400, "unknown_field", "stream_options.pace"),
        ({"messages": ASK, "logit_bias": {"999999": 1}}, 400, "token_range", None),
        (
            {"messages": ASK, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            400,
            "constraint",
            None,
        ),
    ],
)
def test_what_is_wrong_is_said(client: httpx.Client, body: Any, status: int, code: str, param: str | None) -> None:
    answer = client.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert param is None or error["param"] == param
    assert answer.headers["x-request-id"]


def test_unknown_fields_are_warned_of_where_that_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--unknown-fields", "warn", "--data", str(tmp_path / "data"))
    with serving(tiny_model, *flags) as server, server.client() as client:
        found = client.post("/v1/embeddings", json={"input": "Water", "colour": "red"}).json()
        assert len(found["data"]) == 1 and found["warnings"] == ["colour: not supported, ignored"]
        assert "warnings" not in client.post("/v1/embeddings", json={"input": "Water"}).json()
        body = {"prompt": "Water", "max_tokens": 1, "stream": True, "stream_options": {"pace": 1}}
        event = json.loads(client.post("/v1/completions", json=body).text.splitlines()[0].removeprefix("data: "))
        assert event["warnings"] == ["stream_options.pace: not supported, ignored"]


def test_null_stream_options_are_absent(client: httpx.Client) -> None:
    for options in (None, {"include_usage": None}):
        body = {"prompt": "Water", "max_tokens": 1, "stream": True, "stream_options": options}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200 and "usage" not in answer.text


def test_unknown_paths_and_methods_are_errors_in_openai_s_form(client: httpx.Client) -> None:
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert client.get("/v1/chat/completions").json()["error"]["code"] == "method_not_allowed"


def test_a_page_of_another_origin_may_not_ask(client: httpx.Client, server: RunningServer) -> None:
    ask = {"messages": ASK, "max_tokens": 1}
    foreign = client.post("/v1/chat/completions", json=ask, headers={"Origin": "https://example.org"})
    assert foreign.status_code == 403 and foreign.json()["error"]["code"] == "origin_not_allowed"
    assert client.post("/v1/chat/completions", json=ask, headers={"Origin": server.url}).status_code == 200
    rebound = client.get("/stats", headers={"Host": "example.org"})
    assert rebound.status_code == 403


def wait_until_idle(client: httpx.Client) -> dict[str, Any]:
    for _ in range(100):
        now: dict[str, Any] = client.get("/stats").json()["now"]
        if now["running"] + now["waiting"] == 0:
            return now
        time.sleep(0.05)
    raise AssertionError(f"requests stay in the engine: {now}")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_work(server: RunningServer, client: httpx.Client, stream: bool) -> None:
    body = {"messages": ASK, "max_tokens": 900, "ignore_eos": True, "stream": stream}
    with (
        server.client() as leaving,
        pytest.raises((httpx.ReadTimeout, InterruptedError)),
        leaving.stream("POST", "/v1/chat/completions", json=body, timeout=0.3) as answer,
    ):
        next(answer.iter_lines())
        raise InterruptedError
    assert wait_until_idle(client)["kv_used_bytes"] == 0


def test_requests_are_counted_whatever_answers_they_have(client: httpx.Client) -> None:
    wait_until_idle(client)
    body = {"messages": ASK, "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 3}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(lines := answer.iter_lines())
        now = client.get("/stats").json()["now"]
        list(lines)
    assert (now["running"], now["waiting"]) == (1, 0)
    wait_until_idle(client)


def wait_for_line(server: RunningServer, name: str) -> dict[str, Any]:
    """The line that the access log has written of the request called so."""
    for _ in range(100):
        for line in list(server.log):
            if name in line:
                found: dict[str, Any] = json.loads(line)
                return found
        time.sleep(0.05)
    raise AssertionError(f"the log says nothing of {name}")


@pytest.mark.parametrize("stream", [True, False])
def test_the_access_log_counts_the_tokens_of_an_answer(
    server: RunningServer, client: httpx.Client, stream: bool
) -> None:
    body = {"messages": ASK, "max_tokens": 7, "ignore_eos": True, "stream": stream}
    name = client.post("/v1/chat/completions", json=body).headers["x-request-id"]
    line = wait_for_line(server, name)
    assert line["output_tokens"] == 7 and line["prompt_tokens"] > 0


def test_a_full_queue_says_when_to_come_back(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--max-queue", "0", "--max-sequences", "2", "--data", str(tmp_path))
    with serving(tiny_model, *flags) as server, server.client() as client:
        long = {"messages": ASK, "max_tokens": 900, "ignore_eos": True, "n": 2}
        busy = threading.Thread(target=client.post, args=("/v1/chat/completions",), kwargs={"json": long})
        busy.start()
        time.sleep(0.1)
        with server.client() as other:
            refused = other.post("/v1/chat/completions", json={"messages": ASK})
        busy.join()
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1


def test_keys_are_asked_for_and_kept_apart(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    tokens = [add_key(file, Key(name, requests_per_minute=limit)) for name, limit in (("ann", None), ("ben", 1))]
    flags = ("--api-key-file", str(file), "--data", str(tmp_path / "data"))
    with serving(tiny_model, *flags) as server, server.client() as client:
        body = {"messages": [{"role": "user", "content": "wheel " * 80}], "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=body).status_code == 401
        assert client.get("/health").status_code == 200
        cached = []
        for token in (tokens[0], tokens[0], tokens[1]):
            answer = client.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {token}"})
            cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == 0 and cached[1] > 0 and cached[2] == 0
        again = client.post("/v1/chat/completions", json=body, headers={"x-api-key": tokens[1]})
        assert again.status_code == 429 and "retry-after" in again.headers
        lines = "".join(server.log)
        assert '"key":"ann"' in lines and tokens[0] not in lines and "wheel wheel" not in lines


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_may_bound_its_time(client: httpx.Client, stream: bool) -> None:
    body = {"messages": ASK, "max_tokens": 900, "ignore_eos": True, "stream": stream, "n": 8}
    answer = client.post("/v1/chat/completions", json=body, headers={"X-Request-Timeout": "0.3"})
    assert "timeout" in answer.text and (stream or answer.status_code == 504)
    assert wait_until_idle(client)["kv_used_bytes"] == 0
    assert client.post("/v1/chat/completions", json=body, headers={"X-Request-Timeout": "soon"}).status_code == 400


def test_sigterm_lets_a_stream_end(tiny_model: Path, tmp_path: Path) -> None:
    with serving(tiny_model, "--data", str(tmp_path)) as server, server.client() as client:
        body = {"messages": ASK, "max_tokens": 300, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in "".join(rest)
        assert server.process.wait(30) == 0


def test_the_model_s_makers_and_then_the_user_say_how_to_sample(tiny_model: Path, tmp_path: Path) -> None:
    advised = make_tiny_model(tmp_path / "advised")
    advice = {"do_sample": True, "temperature": 0.3, "top_k": 20, "max_length": 4096}
    (advised / "generation_config.json").write_text(json.dumps(advice))
    options = ServeOptions(data=str(tmp_path / "data"))
    for model, temperature, top_k in ((advised, 0.3, 20), (tiny_model, 1.0, 0)):
        engine = engine_options(model)
        with LLM(**asdict(engine)) as llm:
            service = Service(options, SamplingOptions(temperature=1.0), Models(engine, options))
            plain = service.defaults(llm)
            assert (plain.temperature, plain.top_k) == (temperature, top_k) and plain.max_tokens == llm.context_length
            chosen = SamplingOptions(temperature=0.7, max_tokens=5)
            service.sampling, service.chosen = chosen, frozenset({"temperature", "max_tokens"})
            given = service.defaults(llm)
            assert (given.temperature, given.top_k, given.max_tokens) == (0.7, top_k, 5)
            service.batches.store.close()


def test_a_second_model_is_loaded_when_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=9)
    flags = ("--also", str(other), "--idle-seconds", "0", "--data", str(tmp_path / "data"))
    with serving(tiny_model, *flags) as server, server.client() as client:
        loaded = {each["name"]: each["loaded"] for each in client.get("/stats").json()["models"]}
        assert loaded == {"tiny": True, "other": False}
        answer = client.post("/v1/chat/completions", json={"model": "other", "messages": ASK, "max_tokens": 4})
        assert answer.json()["model"] == "other"
        for _ in range(100):
            if not client.get("/stats").json()["models"][1]["loaded"]:
                return
            time.sleep(0.1)
        raise AssertionError("the idle model stays loaded")


def test_a_client_chooses_a_kv_policy_by_the_models_name(tmp_path: Path) -> None:
    model, kv, prompt = make_tiny_model(tmp_path / "tiny", head_dim=32), "kivi(k=2, v=2)", list(range(3, 203))
    body = {"prompt": prompt, "max_tokens": 20, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    flags = ("--kv-also", kv, "--kv-also", "snapkv", "--block-size", "32", "--data", str(tmp_path / "data"))
    with serving(model, *flags) as server, server.client() as client:
        listed = [each["id"] for each in client.get("/v1/models").json()["data"]]
        assert listed == ["tiny", f"tiny:{kv}", "tiny:snapkv"]
        found = {}
        for name in ("tiny", f"tiny:{kv}", "tiny: kivi(k=2,v=2) "):
            reply = client.post("/v1/completions", json=body | {"model": name}).json()
            found[name] = reply["choices"][0]["logprobs"]["token_logprobs"]
            assert reply["model"] == name if name in listed else listed[1]
        refused = client.post("/v1/completions", json=body | {"model": "tiny:kivi(k=4)"})
        assert refused.status_code == 404 and f"tiny:{kv}" in refused.json()["error"]["message"]
        row = {
            "custom_id": "a",
            "method": "POST",
            "url": "/v1/completions",
            "body": body | {"model": "tiny:kivi(k=2,v=2)"},
        }
        files = {"file": json.dumps(row).encode()}
        file = client.post("/v1/files", files=files, data={"purpose": "batch"}).json()["id"]
        asked = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = client.post("/v1/batches", json=asked).json()
        while batch["status"] not in ("completed", "failed"):
            time.sleep(0.05)
            batch = client.get(f"/v1/batches/{batch['id']}").json()
        assert batch["model"] == f"tiny:{kv}"
        line = client.get(f"/v1/files/{batch['output_file_id']}/content").json()
        found["batch"] = line["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"]
    assert found[f"tiny:{kv}"] == found["tiny: kivi(k=2,v=2) "] == found["batch"] != found["tiny"]
    with LLM(str(model), kv=kv, precision="fp32", threads=1) as llm:
        (expected,) = llm.generate([prompt], SamplingParams(max_tokens=20, ignore_eos=True, logprobs=1), progress=False)
    logprobs = [each.logprob for each in expected.outputs[0].logprobs]
    assert found[f"tiny:{kv}"] == pytest.approx(logprobs, abs=1e-6)


def test_caches_together_are_promised_one_share_of_what_is_free(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny", head_dim=32)
    engine = EngineOptions(model=str(model), precision="fp32", block_size=32, kv_memory_share=0.6, threads=1)
    models = Models(engine, ServeOptions(kv_also=("kivi", "snapkv")))

    async def open_all() -> list[int]:
        models.start()
        try:
            opened = await asyncio.gather(*(models.open(name) for name in models.known_models()))
            return [llm.resolved["kv_cache_bytes"] for _, _, llm in opened]
        finally:
            await models.close()

    free, budgets = read_available_bytes(), asyncio.run(open_all())
    assert len(budgets) == 3 and all(0.15 < budget / free < 0.25 for budget in budgets)


def test_a_kv_policy_that_cannot_serve_keeps_the_server_from_starting(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="there is no policy 'kivy'"):
        RunningServer(tiny_model, "--kv-also", "kivy")
    with pytest.raises(RuntimeError, match="head size 16 cannot be sealed"):
        RunningServer(tiny_model, "--kv-also", "kivi", "--block-size", "32")
    with pytest.raises(RuntimeError, match="with kv snapkv no prefixes are shared"):
        RunningServer(tiny_model, "--kv-also", "snapkv", "--kv-dir", str(tmp_path))


def test_a_request_to_a_model_that_was_just_freed_fails(tiny_model: Path) -> None:
    async def ask() -> BaseException:
        options = ServeOptions()
        worker = Worker(engine_options(tiny_model), Pace(options), asyncio.get_running_loop(), Turns())
        llm = await asyncio.wrap_future(worker.ready)
        await asyncio.to_thread(worker.close)
        exchange = Exchange(Request("late", (5, 6), SamplingParams()), llm.tokenizer)
        worker.submit(exchange.request, exchange)
        with pytest.raises(HeadraceError) as failure:
            await asyncio.wait_for(exchange.result(), 10)
        return failure.value

    assert "ask again" in str(asyncio.run(ask()))


def test_a_taken_port_and_a_wrong_model_are_said_at_once(
    server: RunningServer, tiny_model: Path, tmp_path: Path
) -> None:
    port = server.url.rpartition(":")[2]
    with pytest.raises(RuntimeError, match=f"cannot listen on 127.0.0.1 port {port}"):
        RunningServer(tiny_model, "--port", port)
    with pytest.raises(RuntimeError, match="no model"):
        RunningServer(tmp_path)
