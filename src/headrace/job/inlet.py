"""Where a feed's requests go, and when it should read more. Knows no row, no file and no journal."""

from __future__ import annotations

from typing import Protocol

from headrace.core import Request
from headrace.engine.engine import Engine
from headrace.meter.stopwatch import Stopwatch
from headrace.schedule.window import Window


class Inlet(Protocol):
    """What a feed needs of whoever computes. Answers come another way: their owner hands them to the feed.

    `context_length` is in tokens; `watch` counts the feed's own work, in the feed's thread.
    """

    context_length: int
    watch: Stopwatch

    def add(self, request: Request) -> None:
        """Take a request, whose id no unfinished one has. May raise RowError for one that can never run."""
        ...

    def wants(self, held_bytes: int) -> bool:
        """Whether more rows should be read now, while those on their way take so much. Asked once before each read,
        for the answer may depend on the one before."""
        ...


class EngineInlet:
    """A job's own engine, which the job steps whenever no more rows are wanted: so its window is full at each step.

    While it is `paused` it wants none.
    """

    def __init__(self, engine: Engine) -> None:
        self.context_length = engine.context_length
        self.watch = engine.meter.watch
        self.window = Window(engine.state, engine.planner.schedule)
        self.paused = False
        self._engine = engine

    def add(self, request: Request) -> None:
        self._engine.add(request)

    def wants(self, held_bytes: int) -> bool:
        return not self.paused and self.window.wants(held_bytes)

    def reopen(self) -> None:
        """End a pause; the engine may have another state than before."""
        self.window.state, self.paused = self._engine.state, False
