"""What hostile clients send: every request is refused in words or by a closed connection, soon, and disturbs nobody.

One server with the tiny model takes it all, while a plain client beside it measures how long it waits for its answers.
"""

from __future__ import annotations

import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from servers import RunningServer, serving

MEGABYTE = 10**6
HEAD_SECONDS = 2
FLAGS = ("--max-body", "4MB", "--body-timeout", str(HEAD_SECONDS), "--kv-cache-bytes", "32MiB")
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
ASK = [{"role": "user", "content": "Why?"}]
# The longest that the plain client may wait for a short answer meanwhile, and for one in a hundred.
LONGEST_WAIT, USUAL_WAIT = 4.0, 1.5
# Megabytes that the allocator and the cached grammars may keep.
MOST_GROWTH = 400


class Witness(threading.Thread):
    """A plain client that asks for two tokens, again and again, and keeps how long that took."""

    def __init__(self, server: RunningServer) -> None:
        super().__init__(daemon=True)
        self.waits: list[float] = []
        self.wrong: list[str] = []
        self.memory = 0.0
        self.over = threading.Event()
        self._server = server

    def run(self) -> None:
        with self._server.client() as client:
            self.memory = read_memory(self._server)
            while not self.over.wait(0.05):
                began = time.perf_counter()
                found = client.post(COMPLETIONS, json={"prompt": "The wheel", "max_tokens": 2})
                self.waits.append(time.perf_counter() - began)
                if found.status_code != 200:
                    self.wrong.append(found.text)


def read_memory(server: RunningServer) -> float:
    """Megabytes that are in use."""
    return float(psutil.Process(server.process.pid).memory_info().rss) / MEGABYTE


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tiny_model, "--data", str(tmp_path_factory.mktemp("data")), *FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def witness(server: RunningServer) -> Iterator[Witness]:
    found = Witness(server)
    found.start()
    yield found
    found.over.set()
    found.join(20)


@pytest.fixture(scope="module")
def client(server: RunningServer, witness: Witness) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": ASK, "max_tokens": 4} | fields


def complete(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Why?", "max_tokens": 4} | fields


def nest(depth: int, before: str, middle: str, after: str) -> str:
    return before * depth + middle + after * depth


def chain(count: int, first: str, link: str, last: str) -> str:
    """Rules of a grammar that each name the next."""
    return "\n".join([first, *(link.format(n, n + 1) for n in range(count)), last.format(count)])


def refs(count: int, link: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """A JSON schema whose definitions each name the next."""
    found = {str(n): link({"$ref": f"#/$defs/{n + 1}"}) for n in range(count)}
    return {"$ref": "#/$defs/0", "$defs": found | {str(count): {"type": "string"}}}


def check_refused(response: httpx.Response, *statuses: int) -> None:
    """Refused in words, of which there are not too many."""
    assert response.status_code in (statuses or (400,)), response.text[:500]
    body = response.json()
    assert body["error"]["message"] and len(response.content) < 2000, response.text[:500]


# Bodies.

BODIES: dict[str, bytes] = {
    "empty": b"",
    "space": b" \n\t",
    "word": b"hello",
    "list": b"[]",
    "number": b"1",
    "null": b"null",
    "cut off": b'{"prompt": "Why',
    "twice": b'{"prompt": "a"}{"prompt": "b"}',
    "single quotes": b"{'prompt': 'a'}",
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-8 cut off": b'{"prompt": "\xf0\x9f"}',
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "UTF-8 surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "surrogates in the wrong order": b'{"prompt": "\\udc00\\ud800"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": Infinity}',
    "minus Infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "1e999": b'{"prompt": "a", "temperature": 1e999}',
    "5,000 digits": b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
    "deep lists": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "101 levels": b'{"prompt": ' + b"[" * 101 + b"]" * 101 + b"}",
    "unclosed lists": b"[" * MEGABYTE,
    "form": b"prompt=Why&max_tokens=4",
    "zeros": b"\0" * 1000,
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_bodies_that_are_no_json_objects(client: httpx.Client, body: bytes) -> None:
    check_refused(client.post(COMPLETIONS, content=body))


def test_many_small_lists_are_read_beside_others(client: httpx.Client) -> None:
    check_refused(client.post(COMPLETIONS, content=b'{"prompt": [' + b"[]," * MEGABYTE + b"[]]}"))


def test_the_last_of_equal_names_counts(client: httpx.Client) -> None:
    found = client.post(COMPLETIONS, content=b'{"prompt": 1, "max_tokens": 1, "prompt": "Why?"}')
    assert found.status_code == 200, found.text


# Fields.

WRONG: list[Any] = [-1, 1.5, 10**30, True, "", "x", [], {}, [[]], [None], {"a": None}, "\0", "\x1b[2J", "9" * 5000]
OBJECTS = {"metadata": {}, "logit_bias": {}, "chat_template_kwargs": {}}
FIELDS = {
    CHAT: "model messages max_tokens n temperature top_p top_k min_p min_tokens stop stop_token_ids seed logit_bias "
    "logprobs top_logprobs response_format tools tool_choice functions function_call stream stream_options "
    "guided_json guided_regex guided_choice guided_grammar structured_outputs priority service_tier "
    "prompt_cache_key presence_penalty frequency_penalty repetition_penalty ignore_eos chat_template_kwargs "
    "continue_final_message add_generation_prompt add_special_tokens parallel_tool_calls echo user metadata",
    COMPLETIONS: "model prompt suffix echo best_of logprobs stream stream_options stop n max_tokens seed priority",
    EMBEDDINGS: "model input encoding_format dimensions user",
    RESPONSES: "model input instructions text tools tool_choice include top_logprobs reasoning metadata truncation "
    "temperature top_p max_output_tokens service_tier priority user stream stop conversation",
    MESSAGES: "model messages system max_tokens stop_sequences temperature top_p top_k metadata service_tier thinking "
    "tools tool_choice stream output_config",
    COUNT: "model messages system tools tool_choice",
    TOKENIZE: "model prompt messages tools add_special_tokens",
    DETOKENIZE: "model tokens",
}
PLAIN: dict[str, dict[str, Any]] = {
    CHAT: chat(),
    COMPLETIONS: complete(),
    EMBEDDINGS: {"input": "Why?"},
    RESPONSES: {"input": "Why?", "max_output_tokens": 4},
    MESSAGES: chat(),
    COUNT: {"messages": ASK},
    TOKENIZE: {"prompt": "Why?"},
    DETOKENIZE: {"tokens": [5]},
}


@pytest.mark.parametrize("path", FIELDS)
def test_wrong_types_of_every_field(client: httpx.Client, path: str) -> None:
    """Some of these values are right for some of the fields; nothing else than an answer or a refusal comes back."""
    refused = 0
    for name in FIELDS[path].split():
        for value in WRONG:
            found = client.post(path, json=PLAIN[path] | {name: value})
            assert found.status_code in (200, 400, 404), f"{name}={value!r:.40}: {found.status_code} {found.text[:300]}"
            refused += found.status_code != 200
            assert found.status_code == 200 or len(found.content) < 2000, f"{name}={value!r:.40}"
    assert refused > 3 * len(FIELDS[path].split())


MANY = [{"type": "function", "function": {"name": f"f{n}"}} for n in range(1000)]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
CALLED = [*ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c", "content": "x"}]
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "negative token": (COMPLETIONS, complete(prompt=[-1])),
    "huge token": (COMPLETIONS, complete(prompt=[10**18])),
    "token past the vocabulary": (COMPLETIONS, complete(prompt=[100_000])),
    "token that is true": (COMPLETIONS, complete(prompt=[True, 5])),
    "token with a point": (COMPLETIONS, complete(prompt=[5.0])),
    "no tokens": (COMPLETIONS, complete(prompt=[])),
    "one list without tokens": (COMPLETIONS, complete(prompt=[[]])),
    "texts and tokens": (COMPLETIONS, complete(prompt=["a", 5])),
    "lists in lists": (COMPLETIONS, complete(prompt=[[[[5]]]])),
    "empty text": (COMPLETIONS, complete(prompt="")),
    "10,000 prompts": (COMPLETIONS, complete(prompt=["a"] * 10_000)),
    "a million tokens": (COMPLETIONS, complete(prompt=[5] * MEGABYTE)),
    "3 MB of text": (COMPLETIONS, complete(prompt="The wheel turns. " * 180_000)),
    "3 MB of one letter": (COMPLETIONS, complete(prompt="a" * 3 * MEGABYTE)),
    "3 MB to embed": (EMBEDDINGS, {"input": "a" * 3 * MEGABYTE}),
    "3 MB to tokenize": (TOKENIZE, {"prompt": "😀" * 200_000}),
    "3 MB to count": (COUNT, {"messages": [{"role": "user", "content": "a" * 3 * MEGABYTE}]}),
    "a million ids": (DETOKENIZE, {"tokens": [5] * MEGABYTE}),
    "huge id": (DETOKENIZE, {"tokens": [2**40]}),
    "a message of no blocks": (MESSAGES, chat(messages=[{"role": "user", "content": []}])),
    "no messages": (CHAT, chat(messages=[])),
    "30,000 messages": (CHAT, chat(messages=ASK * 30_000)),
    "10,000 stops": (CHAT, chat(stop=[f"stop {n}" for n in range(10_000)])),
    "empty stop": (CHAT, chat(stop=[""])),
    "stop tokens of no model": (CHAT, chat(stop_token_ids=[2**30], min_tokens=2)),
    "100,000 stop tokens": (CHAT, chat(stop_token_ids=[5] * 100_000, min_tokens=2)),
    "n of a million": (CHAT, chat(n=MEGABYTE)),
    "n of none": (CHAT, chat(n=0)),
    "100,000 biases": (CHAT, chat(logit_bias={str(n): 1 for n in range(100_000)})),
    "bias of no token": (CHAT, chat(logit_bias={"99999999": 1})),
    "bias of Arabic digits": (CHAT, chat(logit_bias={"٣": 1})),
    "bias of 5,000 digits": (CHAT, chat(logit_bias={"9" * 5000: 1})),
    "bias past its limit": (CHAT, chat(logit_bias={"5": 1e300})),
    "max_tokens past the context": (CHAT, chat(max_tokens=10**12)),
    "1,000 tools": (CHAT, chat(tools=MANY)),
    "template without messages": (CHAT, chat(chat_template_kwargs={"messages": []})),
    "template without tools": (CHAT, chat(chat_template_kwargs={"tools": []})),
    "template's own names": (CHAT, chat(chat_template_kwargs={"self": 1, "tokenizer": 1})),
    "surrogate in a schema": (CHAT, chat(guided_json='{"const": "\\ud800"}')),
    "picture": (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}])),
    "deep schema as text": (CHAT, chat(guided_json=nest(100_000, '{"items":', "{}", "}"))),
    "schema of 3 MB": (CHAT, chat(guided_json={"enum": [f"value {n}" for n in range(200_000)]})),
    "schema of 10,000 fields": (CHAT, chat(guided_json={"properties": {f"p{n}": {} for n in range(10_000)}})),
    "schema that names itself": (CHAT, chat(guided_json={"$ref": "#"})),
    "schema of definitions in a ring": (CHAT, chat(guided_json=refs(1, lambda ref: ref) | {"$ref": "#/$defs/x"})),
    "schema of 3,000 definitions": (CHAT, chat(guided_json=refs(3000, lambda ref: {"items": ref}))),
    "schema that doubles": (CHAT, chat(guided_json=refs(40, lambda ref: {"allOf": [{"anyOf": [ref, ref]}] * 2}))),
    "deep regex": (CHAT, chat(guided_regex=nest(20_000, "(", "a", ")"))),
    "regex of nested counts": (CHAT, chat(guided_regex="((a{1000}){1000}){1000}")),
    "regex of 3 MB": (CHAT, chat(guided_regex="a" * 3 * MEGABYTE)),
    "open regex": (CHAT, chat(guided_regex="(")),
    "choices of 3 MB": (CHAT, chat(guided_choice=[f"choice {n}" for n in range(200_000)])),
    "no choices": (CHAT, chat(guided_choice=[])),
    "deep grammar": (CHAT, chat(guided_grammar="start: " + nest(20_000, "(", '"a"', ")"))),
    "grammar of 5,000 rules": (CHAT, chat(guided_grammar=chain(5000, "start: r0", 'r{}: "b" r{}', 'r{}: "a"'))),
    "grammar of 9,000 terms": (CHAT, chat(guided_grammar=chain(9000, "start: R0", 'R{}: "b" R{}', 'R{}: "a"'))),
    "grammar of nested rules": (
        CHAT,
        chat(guided_grammar=chain(700, "start: r0", "r{}: " + "(" * 20 + "r{}" + ")?" * 20, 'r{}: "a"')),
    ),
    "grammar of counts": (CHAT, chat(guided_grammar='start: ((("a"{1000}){1000}){1000}){1000}')),
    "grammar in a ring": (CHAT, chat(guided_grammar='start: R\nR: R "a" | "b"')),
    "grammar of no language": (CHAT, chat(guided_grammar="\0\x1b[31m")),
    "two formats": (CHAT, chat(guided_regex="a", guided_choice=["a"])),
}


@pytest.mark.parametrize(("path", "body"), REFUSED.values(), ids=REFUSED)
def test_requests_for_too_much_or_nonsense(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    began = time.perf_counter()
    found = client.post(path, json=body)
    assert time.perf_counter() - began < 20
    if path in (COUNT, MESSAGES):
        assert found.status_code == 400 and found.json()["type"] == "error"
    else:
        check_refused(found, 400, 429)


ALLOWED: dict[str, dict[str, Any]] = {
    "stars in stars": {"guided_regex": "(a*)*b"},
    "endless": {"guided_regex": "(.*)*"},
    "a hundred thousand characters": {"guided_regex": ".{100000}"},
    "pluses in pluses": {"guided_regex": "(((a+)+)+)+b"},
    "two to the 20": {"guided_regex": "(.*a.{20}){3}"},
    "an ambiguous grammar": {"guided_grammar": 'start: s\ns: s s s | s s | "a" | /a+/ | /[ab]*/'},
    "a long list": {"guided_json": {"type": "array", "minItems": 10**6, "items": {"type": "integer"}}},
    "a schema for itself": {"guided_json": {"type": "object", "additionalProperties": {"$ref": "#"}}},
    "a seed of a hundred digits": {"seed": 10**100, "temperature": 1},
    "a surrogate in a call": {"messages": CALLED},
    "many answers": {"n": 128, "logit_bias": {str(n): 1 for n in range(300)}, "logprobs": True, "top_logprobs": 20},
    "NUL and escapes": {"messages": [{"role": "user", "content": "\0\x1b[2J\u202e\ufffe"}]},
}


@pytest.mark.parametrize("fields", ALLOWED.values(), ids=ALLOWED)
def test_odd_requests_are_answered_or_refused_in_words(client: httpx.Client, fields: dict[str, Any]) -> None:
    found = client.post(CHAT, json=chat(max_tokens=24) | fields)
    assert found.status_code in (200, 400), found.text[:500]


# Connections. What is no HTTP at all is answered with 400, or the connection is closed.


def talk(server: RunningServer, *pieces: bytes, seconds: float = 10) -> bytes:
    """Send pieces to a server on a connection of their own; all that comes back before it is closed."""
    url = httpx.URL(server.url)
    answer = b""
    with closing(socket.create_connection((url.host, url.port or 80), timeout=seconds)) as plug:
        try:
            for piece in pieces:
                plug.sendall(piece)
            while part := plug.recv(65536):
                answer += part
        except ConnectionError:
            pass
    return answer


def request(
    line: bytes = b"POST /v1/completions HTTP/1.1",
    *headers: bytes,
    body: bytes = b"",
    host: bytes = b"Host: localhost",
) -> bytes:
    return b"\r\n".join([line, host, *headers, b"Connection: close", b"", body])


BODY = json.dumps(complete()).encode()
LENGTH = b"Content-Length: %d" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked"
GET = b"GET /version HTTP/1.1"
RAW: dict[str, tuple[bytes, set[int]]] = {
    "no HTTP": (b"hello\r\n\r\n", {400}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64 + b"\r\n\r\n", {400}),
    "SSH": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", {400}),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 404, 403}),
    "HTTP/0.9": (b"GET /\r\n\r\n", {400}),
    "unknown method": (request(b"BREW /version HTTP/1.1"), {405}),
    "CONNECT": (request(b"CONNECT localhost:22 HTTP/1.1"), {400, 404}),
    "TRACE": (request(b"TRACE /version HTTP/1.1"), {405}),
    "no path": (request(b"GET  HTTP/1.1"), {400}),
    "path with a space": (request(b"GET /a b HTTP/1.1"), {400}),
    "path of a megabyte": (request(b"GET /" + b"a" * MEGABYTE + b" HTTP/1.1"), {400, 414}),
    "path past the root": (request(b"GET /static/../../../../etc/passwd HTTP/1.1"), {404}),
    "path past the root, written in hex": (request(b"GET /static/%2e%2e%2f%2e%2e%2fapp.py HTTP/1.1"), {404}),
    "file past its folder": (request(b"GET /v1/files/..%2f..%2fkeys/content HTTP/1.1"), {404}),
    "file called ..": (request(b"GET /v1/files/../../../etc/passwd HTTP/1.1"), {404}),
    "NUL in a path": (request(b"GET /static/%00 HTTP/1.1"), {404}),
    "NUL in a model's name": (request(b"GET /v1/models/%00%ff HTTP/1.1"), {404}),
    "surrogate in a path": (request(b"GET /v1/batches/%ed%a0%80 HTTP/1.1"), {404}),
    "negative page": (request(b"GET /v1/files?limit=-1&after=%00 HTTP/1.1"), {400, 404}),
    "no Host": (b"GET /version HTTP/1.1\r\nConnection: close\r\n\r\n", {400, 403}),
    "foreign Host": (request(GET, host=b"Host: evil.example"), {403}),
    "two Hosts": (request(GET, b"Host: evil.example"), {400, 403}),
    "Host with a NUL": (request(GET, host=b"Host: local\0host"), {400, 403}),
    "10,000 headers": (request(GET, *(b"X-%d: %s" % (n, b"a" * 90) for n in range(10_000))), {400, 431}),
    "header of a megabyte": (request(GET, b"X: " + b"a" * MEGABYTE), {400, 431}),
    "header with a NUL": (request(GET, b"X: a\0b"), {400}),
    "header without a colon": (request(GET, b"nonsense"), {400}),
    "space before the colon": (request(GET, b"Content-Length : 4"), {400}),
    "lengths that differ": (request(b"POST /tokenize HTTP/1.1", LENGTH, b"Content-Length: 5", body=BODY), {400}),
    "negative length": (request(b"POST /tokenize HTTP/1.1", b"Content-Length: -5", body=BODY), {400}),
    "length in hex": (request(b"POST /tokenize HTTP/1.1", b"Content-Length: 0x10", body=BODY), {400}),
    "unknown coding": (request(b"POST /tokenize HTTP/1.1", b"Transfer-Encoding: gzip", body=BODY), {400, 501}),
    "codings that differ": (request(b"POST /tokenize HTTP/1.1", CHUNKED, CHUNKED, body=b"0\r\n\r\n"), {400, 501}),
    "chunks without sizes": (request(b"POST /tokenize HTTP/1.1", CHUNKED, body=b"xyz\r\n\r\n"), {400}),
    "chunk of a negative size": (request(b"POST /tokenize HTTP/1.1", CHUNKED, body=b"-1\r\n\r\n"), {400}),
    "announced 100 GB": (request(b"POST /tokenize HTTP/1.1", b"Content-Length: 100000000000"), {413}),
    "body past the limit": (
        request(b"POST /tokenize HTTP/1.1", b"Content-Length: 9000000", body=b" " * 9_000_000),
        {413},
    ),
    "chunks past the limit": (
        request(b"POST /tokenize HTTP/1.1", CHUNKED, body=(b"186a0\r\n" + b" " * 100_000 + b"\r\n") * 60),
        {413},
    ),
    "file without a form": (request(b"POST /v1/files HTTP/1.1", LENGTH, body=BODY), {400}),
    "form without an end": (
        request(
            b"POST /v1/files HTTP/1.1",
            b"Content-Type: multipart/form-data; boundary=x",
            b"Content-Length: 50",
            body=b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n".ljust(50, b"-"),
        ),
        {400},
    ),
    "form without a boundary": (
        request(b"POST /v1/files HTTP/1.1", b"Content-Type: multipart/form-data", LENGTH, body=BODY),
        {400},
    ),
}


@pytest.mark.parametrize(("sent", "statuses"), RAW.values(), ids=RAW)
def test_requests_that_are_hardly_http(
    server: RunningServer, witness: Witness, sent: bytes, statuses: set[int]
) -> None:
    answer = talk(server, sent)
    if answer:  # a server that closes while the client still sends may be heard or not
        assert int(answer.split(b" ", 2)[1]) in statuses, answer[:300]
        assert b"root:" not in answer


def test_a_body_hidden_behind_another_is_no_second_request(server: RunningServer, witness: Witness) -> None:
    """Length and chunks at once: what stands behind the chunks must not be answered as a request of its own."""
    hidden = b"0\r\n\r\nGET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
    headers = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n%s\r\n\r\n" % (len(hidden), CHUNKED)
    answer = talk(server, headers + hidden)
    assert answer.count(b"HTTP/1.1") <= 1 and b'"version"' not in answer, answer


def test_ids_with_escapes_are_replaced(client: httpx.Client) -> None:
    for given in ("\x1b[31mred", "a b", "x" * 200, "%0d%0aSet-Cookie: a=b"):
        found = client.get("/version", headers={"X-Request-Id": given})
        assert found.headers["x-request-id"].startswith("req_") and "set-cookie" not in found.headers


def test_old_and_careful_clients_are_answered(server: RunningServer, witness: Witness) -> None:
    old = talk(server, b"GET /version HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert old.startswith(b"HTTP/1.1 200")
    careful = talk(server, request(b"POST /v1/completions HTTP/1.1", LENGTH, b"Expect: 100-continue"), BODY)
    assert careful.startswith(b"HTTP/1.1 100 ") and b"HTTP/1.1 200" in careful
    plain = request(b"POST /v1/completions HTTP/1.1", LENGTH, b"Content-Type: image/png", body=BODY)
    assert talk(server, plain).startswith(b"HTTP/1.1 200")
    first = plain.replace(b"Connection: close\r\n", b"")
    assert talk(server, first * 20 + plain).count(b"HTTP/1.1 200") == 21


def drip(server: RunningServer, head: bytes) -> tuple[bytes, float]:
    """Send a head, then a byte every now and then; what came back, and after how many seconds it was over."""
    url = httpx.URL(server.url)
    began = time.perf_counter()
    with closing(socket.create_connection((url.host, url.port or 80), timeout=0.2)) as plug:
        plug.sendall(head)
        while time.perf_counter() - began < 20:
            try:
                plug.sendall(b"a")
                return plug.recv(65536), time.perf_counter() - began
            except TimeoutError:
                continue
            except ConnectionError:
                return b"", time.perf_counter() - began
    raise AssertionError("the connection was never closed")


@pytest.mark.parametrize(
    "head",
    [b"", b"GET /version HTTP/1.1\r\n", request().removesuffix(b"\r\n"), b"G"],
    ids=["nothing", "a line", "no end", "a letter"],
)
def test_heads_that_drip_are_cut_off(server: RunningServer, witness: Witness, head: bytes) -> None:
    answer, seconds = drip(server, head)
    assert seconds < 3 * HEAD_SECONDS and b" 200 " not in answer


def test_bodies_that_drip_are_cut_off(server: RunningServer, witness: Witness) -> None:
    answer, seconds = drip(server, request(b"POST /tokenize HTTP/1.1", b"Content-Length: 1000000"))
    assert answer.startswith(b"HTTP/1.1 408 ") and seconds < 3 * HEAD_SECONDS


def test_clients_that_leave_are_forgotten(server: RunningServer, client: httpx.Client) -> None:
    """They connect and leave; leave in the middle of a body, or of an answer; or take nothing of it."""
    url = httpx.URL(server.url)
    long = json.dumps(complete(max_tokens=900, n=4, ignore_eos=True, stream=True)).encode()
    ask = request(b"POST /v1/completions HTTP/1.1", b"Content-Length: %d" % len(long), body=long)
    for sent in (b"", b"GET", ask[:-10], ask):
        plugs = [socket.create_connection((url.host, url.port or 80), timeout=10) for _ in range(20)]
        for plug in plugs:
            plug.sendall(sent)
        for plug in plugs[::2]:
            plug.shutdown(socket.SHUT_WR)
        for plug in plugs:
            plug.close()
    wait_for_quiet(client)


def wait_for_quiet(client: httpx.Client) -> dict[str, Any]:
    """The figures of a server once nothing but the witness's requests runs any more."""
    until = time.monotonic() + 20
    while (now := client.get("/stats").json()["now"])["running"] + now["waiting"] > 1:
        assert time.monotonic() < until, now
        time.sleep(0.1)
    return dict(now)


def test_afterwards_all_is_as_before(server: RunningServer, client: httpx.Client, witness: Witness) -> None:
    """Must stand last."""
    wait_for_quiet(client)
    witness.over.set()
    witness.join(20)
    assert client.get("/ready").status_code == 200 and server.process.poll() is None
    now = wait_for_quiet(client)
    assert (now["running"], now["waiting"], now["background"], now["kv_used_bytes"]) == (0, 0, 0, 0)
    assert not [line for line in server.log if "Traceback" in line], "".join(server.log)[-3000:]
    assert witness.wrong == [] and len(witness.waits) > 50
    print(f"waits: {len(witness.waits)}, {statistics.median(witness.waits):.3f} s, at most {max(witness.waits):.2f} s")
    assert max(witness.waits) < LONGEST_WAIT
    assert sorted(witness.waits)[len(witness.waits) * 99 // 100] < USUAL_WAIT
    memory = read_memory(server)
    print(f"memory: {witness.memory:.0f} MB before, {memory:.0f} MB after")
    assert memory - witness.memory < MOST_GROWTH
