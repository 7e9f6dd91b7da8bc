"""One line of JSON a request, and what the server itself has to say. Neither ever holds a key or anything of a text."""

from __future__ import annotations

import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ACCESS = logging.getLogger("headrace.access")
SERVER = logging.getLogger("headrace.server")
LONGEST_PATH = 256
# What handlers and other middlewares may put into scope["state"], and what the line calls it.
FIELDS = {
    "request_id": "request_id",
    "key_name": "key",
    "model": "model",
    "prompt_tokens": "prompt_tokens",
    "output_tokens": "output_tokens",
}


class AccessLog:
    """Logs every request when its answer has ended: who, what, how long, how much; see FIELDS.

    `status` is null where nothing was answered, as when the client left first. `complete` is false where the answer was
    cut off. Queries are left out, for a client may have put a key there.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began = time.perf_counter()
        state = scope.setdefault("state", {})
        answer = Answer()

        async def watch(message: Message) -> None:
            await send(message)
            answer.note(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            answer.status = answer.status or 500
            raise
        finally:
            line: dict[str, Any] = {"time": format_time(time.time())}
            line |= {name: state[field] for field, name in FIELDS.items() if state.get(field) is not None}
            line |= {"method": scope["method"], "path": scope["path"][:LONGEST_PATH]}
            line |= {"seconds": round(time.perf_counter() - began, 6), **answer.describe()}
            ACCESS.info("%s", msgspec.json.encode(line).decode())


class Answer:
    """What has been sent of one answer."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.bytes = 0
        self.complete = False

    def note(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.bytes += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)

    def describe(self) -> dict[str, int | bool | None]:
        return {"status": self.status, "bytes": self.bytes, "complete": self.complete}


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": format_time(record.created), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure_logging(json: bool, level: str = "INFO") -> None:
    """Let the server and its access log write to standard error; the server's own lines as JSON where asked.

    `level` is the server's: DEBUG, INFO, WARNING or ERROR. May be called again.
    """
    human = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    for logger, formatter in ((SERVER, JsonFormatter() if json else human), (ACCESS, logging.Formatter("%(message)s"))):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(formatter)
        logger.handlers = [handler]
        logger.propagate = False
    SERVER.setLevel(level)
    ACCESS.setLevel(logging.INFO)


def format_time(seconds: float) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
