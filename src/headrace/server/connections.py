"""Connections that send no whole request head in time are closed: else a few thousand of them would fill the server.

Bodies have their own limit, in `limits`. Knows no route.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedConnection(H11Protocol):
    """uvicorn's connection, closed when nobody's turn it is but the client's for `head_seconds`.

    That is the time from its beginning, or from the first byte after an answer, to the end of the next request's head.
    """

    head_seconds = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._hurry()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._hurry()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._relax()

    def _hurry(self) -> None:
        """Let the time run while no request is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._relax()
        elif self._closing is None and not self.transport.is_closing():
            self._closing = self.loop.call_later(self.head_seconds, self.transport.close)

    def _relax(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None


def limit_heads(seconds: float) -> type[TimedConnection]:
    """The connection with another limit."""
    return type("TimedConnection", (TimedConnection,), {"head_seconds": seconds})
