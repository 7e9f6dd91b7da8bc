"""Limits of requests before a handler sees them, and the line that the access log writes of each."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.server.access_log import ACCESS, SERVER, AccessLog, configure_logging
from headrace.server.errors import ApiError, error_response
from headrace.server.limits import BodyLimit, BodyTimeout, HostCheck, RequestIds, is_loopback, parse_json

Came = Message | float


class Client:
    """Sends messages to an application, sleeping where a number stands between them, and keeps what comes back."""

    def __init__(self, *coming: Came, path: str = "/", headers: dict[str, str] | None = None) -> None:
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
        self.scope: Scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": raw}
        self.sent: list[Message] = []
        self._coming = list(coming)

    async def receive(self) -> Message:
        while self._coming and isinstance(self._coming[0], float):
            await asyncio.sleep(self._coming.pop(0))  # type: ignore[arg-type]
        return self._coming.pop(0) if self._coming else {"type": "http.disconnect"}  # type: ignore[return-value]

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def call(self, app: ASGIApp) -> Client:
        asyncio.run(asyncio.wait_for(app(self.scope, self.receive, self.send), 20))  # type: ignore[arg-type]
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def json(self) -> Any:
        return json.loads(b"".join(message.get("body", b"") for message in self.sent[1:]))


def part(body: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


async def measure(request: Request) -> JSONResponse:
    return JSONResponse({"length": len(await request.body())})


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads nothing."""
    await JSONResponse({"state": scope.get("state")})(scope, receive, send)


ROUTES = [Route("/", measure, methods=["POST"]), Route("/v1/files", measure, methods=["POST"])]


async def answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


def build(*middleware: Middleware) -> tuple[Starlette, Starlette]:
    """An application inside of which a limit's error is answered by the limit itself, or by the application."""
    handled = Starlette(routes=ROUTES, middleware=middleware, exception_handlers={ApiError: answer_error})
    return Starlette(routes=ROUTES, middleware=middleware), handled


def test_announced_bodies_are_refused_unread() -> None:
    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the application was called")

    client = Client(headers={"Content-Length": "101"}).call(BodyLimit(never, 100))
    assert client.status == 413 and client.headers["connection"] == "close"
    assert client.json["error"] == {
        "message": "the body is longer than 100 bytes, which is the limit",
        "type": "invalid_request_error",
        "param": None,
        "code": "request_too_large",
    }


@pytest.mark.parametrize(
    ("path", "length", "status"),
    [("/", 100, 200), ("/", 101, 413), ("/v1/files", 1000, 200), ("/v1/files", 1001, 413), ("/v1/files/", 101, 307)],
)
@pytest.mark.parametrize("pieces", [1, 4])
def test_the_bytes_that_come_are_counted(path: str, length: int, status: int, pieces: int) -> None:
    size = -(-length // pieces)
    body = [b"x" * min(size, length - start) for start in range(0, length, size)]
    for app in build(Middleware(BodyLimit, 100, 1000)):
        client = Client(*(part(piece, place < len(body) - 1) for place, piece in enumerate(body)), path=path)
        assert client.call(app).status == status
        if status == 200:
            assert client.json == {"length": length}


def test_what_comes_is_refused_before_it_has_all_come() -> None:
    for app in build(Middleware(BodyLimit, 100)):
        client = Client(part(b"x" * 80), part(b"x" * 80), 60.0, part(b"x", more=False))
        assert client.call(app).status == 413


def test_an_error_after_the_beginning_is_no_second_answer() -> None:
    async def begin_first(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()

    client = Client(part(b"x" * 200))
    with pytest.raises(ApiError):
        client.call(BodyLimit(begin_first, 100))
    assert [message["type"] for message in client.sent] == ["http.response.start"]


@pytest.mark.parametrize(
    ("coming", "status"),
    [
        ([part(b"all", more=False)], 200),
        ([60.0, part(b"late", more=False)], 408),
        ([part(b"a"), 60.0, part(b"b", more=False)], 408),
        ([each for _ in range(100) for each in (part(b"x"), 0.01)], 408),
        ([each for _ in range(20) for each in (part(b"x" * 100), 0.02)] + [part(b"", more=False)], 200),
    ],
    ids=["at once", "nothing", "half", "drops", "much"],
)
def test_a_body_must_come_in_time(coming: Sequence[Came], status: int) -> None:
    for app in build(Middleware(BodyTimeout, 0.2, bytes_per_second=2000)):
        client = Client(*coming).call(app)
        assert client.status == status
        if status == 408:
            assert client.json["error"]["code"] == "request_timeout" and client.headers["connection"] == "close"


def test_after_the_body_there_is_no_hurry() -> None:
    async def wait_for_the_end(scope: Scope, receive: Receive, send: Send) -> None:
        messages = [await receive(), await receive()]
        await JSONResponse([message["type"] for message in messages])(scope, receive, send)

    client = Client(part(b"all", more=False), 0.1, {"type": "http.disconnect"})
    assert client.call(BodyTimeout(wait_for_the_end, 0.02)).json == ["http.request", "http.disconnect"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-1.2_X", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ("a\n", False),
        ("ä", False),
        (None, False),
    ],
)
def test_requests_have_ids(given: str | None, kept: bool) -> None:
    client = Client(headers={} if given is None else {"X-Request-Id": given}).call(RequestIds(plain))
    name = client.headers["x-request-id"]
    assert client.json["state"] == {"request_id": name}
    assert name == given if kept else len(name) == 28 and name.startswith("req_") and name[4:].isalnum()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("api.localhost.", 200),
        ("127.0.0.1:8000", 200),
        ("127.8.9.10", 200),
        ("[::1]:8000", 200),
        ("box.lan:8000", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("192.168.0.1", 403),
        ("0.0.0.0", 403),
        ("", 403),
        (None, 403),
    ],
)
def test_hosts_that_are_not_this_machine_are_refused(host: str | None, status: int) -> None:
    client = Client(headers={} if host is None else {"Host": host}).call(HostCheck(plain, ["Box.lan"]))
    assert client.status == status
    if status == 403:
        assert client.json["error"]["code"] == "host_not_allowed"


def test_addresses_of_this_machine() -> None:
    assert is_loopback("localhost") and is_loopback("127.0.0.1") and is_loopback("::1")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("example.org")


@pytest.mark.parametrize(
    "wrap", [lambda app: BodyLimit(app, 1), lambda app: BodyTimeout(app, 0.0), RequestIds, HostCheck, AccessLog]
)
def test_what_is_no_request_passes(wrap: Callable[[ASGIApp], ASGIApp]) -> None:
    seen: list[str] = []

    async def note(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])
        await receive()

    client = Client({"type": "lifespan.startup"})
    client.scope = {"type": "lifespan"}
    client.call(wrap(note))
    assert seen == ["lifespan"] and client.sent == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty"),
        (b" \n", "the body is empty"),
        (b'{"a": 1,}', "not JSON: .*byte 8"),
        (b'{"a": NaN}', "not JSON: .*byte 6"),
        (b'{"a": Infinity}', "not JSON"),
        (b'{"a": 1e999}', "not JSON"),
        (b'{"a": "\\ud800"}', "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not JSON"),
        (b'{"key": "\xff"}', r"not UTF-8: invalid start byte \(byte 9\)"),
        (b"[1, 2]", "must be a JSON object"),
        (b"3", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "nested deeper than 100 levels"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested deeper than 100 levels"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 100 levels"),
        (b'{"a":' * 1_000_000, "nested deeper than 100 levels"),
    ],
)
def test_bodies_that_are_no_object(body: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        parse_json(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_objects_are_read() -> None:
    assert parse_json(b' {"a": ["\xc3\xa4", "\\ud83d\\ude00", {}], "b": 1.5} \n') == {"a": ["ä", "😀", {}], "b": 1.5}
    assert parse_json(b'{"a":' * 100 + b"1" + b"}" * 100)
    assert len(parse_json(b'{"a": [' + b"[1]," * 5000 + b"[]]}")["a"]) == 5001


@pytest.fixture
def loggers() -> Iterator[None]:
    """Gives the loggers back as they were."""
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in (ACCESS, SERVER)]
    yield
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def log_lines(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


async def stream(scope: Scope, receive: Receive, send: Send) -> None:
    scope["state"] |= {"key_name": "alice", "model": "tiny", "prompt_tokens": 7, "output_tokens": 2, "text": "secret"}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"secret", "more_body": True})
    await send({"type": "http.response.body", "body": b"!", "more_body": False})


async def leave_half(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"12345", "more_body": True})


async def fail(scope: Scope, receive: Receive, send: Send) -> None:
    raise HTTPException(418)


async def say_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()


@pytest.mark.usefixtures("loggers")
def test_one_line_a_request_without_its_content(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(json=True)
    headers = {"Authorization": "Bearer hr-secret", "X-Request-Id": "mine"}
    client = Client(path='/v1/x"\n{secret?', headers=headers)
    client.scope |= {"path": '/v1/x"\nz', "query_string": b"key=hr-secret"}
    client.call(RequestIds(AccessLog(stream)))
    text = capsys.readouterr().err
    assert "secret" not in text and text.count("\n") == 1
    line = json.loads(text)
    assert line.pop("time").endswith("Z") and 0 <= line.pop("seconds") < 5
    assert line == {
        "request_id": "mine",
        "key": "alice",
        "model": "tiny",
        "prompt_tokens": 7,
        "output_tokens": 2,
        "method": "POST",
        "path": '/v1/x"\nz',
        "status": 200,
        "bytes": 7,
        "complete": True,
    }


@pytest.mark.usefixtures("loggers")
@pytest.mark.parametrize(("app", "status", "size"), [(leave_half, 200, 5), (fail, 500, 0), (say_nothing, None, 0)])
def test_answers_that_did_not_end(
    app: Callable[..., Awaitable[None]], status: int | None, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(json=True)
    try:
        Client().call(AccessLog(app))
    except HTTPException:
        assert app is fail
    (line,) = log_lines(capsys)
    assert (line["status"], line["bytes"], line["complete"]) == (status, size, False)


@pytest.mark.usefixtures("loggers")
def test_the_server_speaks_in_lines_or_json(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    configure_logging(json=False, level="INFO")
    configure_logging(json=False, level="WARNING")
    SERVER.info("not said")
    SERVER.warning("3 keys")
    assert capsys.readouterr().err.endswith(" WARNING 3 keys\n")
    configure_logging(json=True)
    logging.getLogger("headrace.server.inner").info("line\nend")
    try:
        raise ValueError("broken")
    except ValueError:
        SERVER.exception("a step failed")
    first, second = log_lines(capsys)
    assert (first["level"], first["message"]) == ("info", "line\nend")
    assert second["level"] == "error" and "ValueError: broken" in second["error"]
    ACCESS.info("{}")
    assert capsys.readouterr().err == "{}\n"
    # Nor does anyone above hear it a second time.
    assert not caplog.records
