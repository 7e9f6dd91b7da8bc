"""Answers that are sent while they are made, and the client that may go away meanwhile. Knows no route."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

# A client that takes nothing for so many seconds is taken for gone.
MOST_SILENCE = 60.0


class ClientGone(Exception):
    """The client has closed the connection: nobody wants the answer."""


async def wait_gone(receive: Receive) -> None:
    """Until the client has closed the connection. Its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def race(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; raises ClientGone, and cancels the work, when the client goes away before it is there."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(wait_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


class EventStream(Response):
    """Server-sent events from a generator of their bytes, which is closed as soon as the client goes away.

    `ended` is called at the end, even where the generator was never begun.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], ended: Callable[[], None]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self.events = events
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        watch = asyncio.ensure_future(wait_gone(receive))
        try:
            await asyncio.wait({sending, watch}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for each in (sending, watch):
                each.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await each
            self.ended()

    async def _send(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in events:
                async with asyncio.timeout(MOST_SILENCE):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
