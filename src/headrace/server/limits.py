"""What every request must keep to before a handler sees it: size, time, Host, id; and a body that is a JSON object.

Plain ASGI middlewares, which pass a stream and a client's going away on as they come; they belong into an application's
list of middlewares. They know no route but the one that takes files.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import secrets
from collections.abc import Collection
from typing import Any

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.server.errors import ApiError, error_response, is_anthropic

FILES = "/v1/files"
MOST_DEPTH = 100
LEAST_RATE = 16 * 1024
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
PORT = re.compile(r":\d*\Z")
# The rest of a body that nobody will read must not be taken for the next request.
CLOSE = {"Connection": "close"}


class BodyLimit:
    """Answers 413 as soon as a body is announced, or has come, that is longer than `max_bytes`.

    A body whose length is said in two ways gets 400. Bodies to /v1/files have a limit of their own.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_file_bytes: int | None = None) -> None:
        self._app = app
        self._most = max_bytes
        self._most_file = max_bytes if max_file_bytes is None else max_file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        most = self._most_file if scope["path"].rstrip("/") == FILES else self._most
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "")
        if announced and "transfer-encoding" in headers:
            return await answer(two_lengths(), scope, receive, send)
        if announced.isdecimal() and int(announced) > most:
            return await answer(too_large(most), scope, receive, send)
        received = 0

        async def count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise too_large(most)
            return message

        await answer_errors(self._app, scope, count, send)


class BodyTimeout:
    """Answers 408 when a body does not arrive within `seconds` from when a handler began to read it.

    Every `bytes_per_second` that have come give a second more: large files may take their time, drops may not.
    """

    def __init__(self, app: ASGIApp, seconds: float, bytes_per_second: int = LEAST_RATE) -> None:
        self._app = app
        self._seconds = seconds
        self._rate = bytes_per_second

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        deadline: float | None = None
        complete = False

        async def hurry() -> Message:
            nonlocal deadline, complete
            if complete:
                return await receive()
            if deadline is None:
                deadline = asyncio.get_running_loop().time() + self._seconds
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise too_slow(self._seconds) from None
            deadline += len(message.get("body", b"")) / self._rate
            complete = not message.get("more_body", False)
            return message

        await answer_errors(self._app, scope, hurry, send)


class RequestIds:
    """Names every request: by its own X-Request-Id where that is a plain word, else by a new random one.

    The id stands in `scope["state"]["request_id"]` and goes back as X-Request-Id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = name

        async def sign(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                # OpenAI's clients read the one, Anthropic's the other.
                headers["x-request-id"] = headers["request-id"] = name
            await send(message)

        await self._app(scope, receive, sign)


class HostCheck:
    """Answers 403 unless the Host header names this machine itself, or is one of `allowed` (names without a port).

    For servers bound to loopback. Without it, any web page could have its own name resolved to 127.0.0.1 and then read
    the answers (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str] = ()) -> None:
        self._app = app
        self._allowed = {name.lower() for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        host = read_host(Headers(scope=scope).get("host", ""))
        if is_loopback(host) or host in self._allowed:
            return await self._app(scope, receive, send)
        message = f"the Host header {host[:80]!r} is not this server's: use localhost, or allow the name"
        await answer(ApiError(403, "host_not_allowed", message, headers=CLOSE), scope, receive, send)


async def answer_errors(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the app, and answer with an ApiError that it let pass, unless it has begun to answer itself."""
    begun = False

    async def watch(message: Message) -> None:
        nonlocal begun
        begun = True
        await send(message)

    try:
        await app(scope, receive, watch)
    except ApiError as error:
        if begun:
            raise
        await answer(error, scope, receive, send)


async def answer(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send an error in the form that the path's clients know."""
    await error_response(error, is_anthropic(scope["path"]))(scope, receive, send)


def too_large(most: int) -> ApiError:
    return ApiError(
        413, "request_too_large", f"the body is longer than {most:,} bytes, which is the limit", None, CLOSE
    )


def two_lengths() -> ApiError:
    """Where proxies and servers go by different ones, a body can hide a request."""
    return ApiError(400, "invalid_request", "Content-Length and Transfer-Encoding exclude each other", None, CLOSE)


def too_slow(seconds: float) -> ApiError:
    return ApiError(408, "request_timeout", f"the body did not arrive within {seconds:g} s", None, CLOSE)


def read_host(header: str) -> str:
    """The name or address in a Host header: lower case, without its port, brackets and last dot."""
    return PORT.sub("", header.strip().lower()).removeprefix("[").removesuffix("]").removesuffix(".")


def is_loopback(host: str) -> bool:
    """Whether a name or an address can only mean this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_json(body: bytes) -> Any:
    """The object that a body holds. Raises ApiError 400 for anything else, with the place where it goes wrong."""
    if not body.strip():
        raise invalid_json("the body is empty")
    try:
        value = msgspec.json.decode(body)
        # Only a body with that many brackets can be that deep.
        deep = body.count(b"[") + body.count(b"{") > MOST_DEPTH and measure_depth(value) > MOST_DEPTH
    except RecursionError:
        deep = True
    except UnicodeDecodeError:
        raise invalid_json(f"the body is not UTF-8: {find_fault(body)}") from None
    except msgspec.DecodeError as error:
        raise invalid_json(f"the body is not JSON: {error}") from None
    if deep:
        raise invalid_json(f"the body is nested deeper than {MOST_DEPTH} levels")
    if not isinstance(value, dict):
        raise invalid_json("the body must be a JSON object")
    return value


def find_fault(body: bytes) -> str:
    """What is wrong with text that is not UTF-8, and in which byte."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return f"{error.reason} (byte {error.start})"
    return "a part of a character"


def measure_depth(value: Any) -> int:
    """Levels of lists and objects inside each other; 0 for a plain value."""
    depth = 0
    level = [value] if isinstance(value, dict | list) else []
    while level:
        depth += 1
        inner = [each for outer in level for each in (outer.values() if isinstance(outer, dict) else outer)]
        level = [each for each in inner if isinstance(each, dict | list)]
    return depth


def invalid_json(message: str) -> ApiError:
    return ApiError(400, "invalid_json", message)
