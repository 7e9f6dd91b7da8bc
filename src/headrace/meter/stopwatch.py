"""Where the time goes: seconds of named parts, none counted twice. Knows nothing of what the parts do."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol


class Listener(Protocol):
    """What hears of every part as it ends."""

    def hear(self, name: str, start: float, end: float) -> None: ...


class Stopwatch:
    """Seconds by part. A part within a part counts for itself, not for the one around it: the sum is what passed.

    For one thread. A part costs about half a microsecond.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.listener: Listener | None = None
        self._open: list[tuple[str, float]] = []
        self._mark = 0.0
        self._whole: str | None = None

    def part(self, name: str) -> Part:
        """For `with`: what happens inside belongs to this part."""
        return Part(self, name)

    @contextmanager
    def whole(self, name: str) -> Iterator[None]:
        """For `with`: what happens inside belongs to this part, and so do the parts in it."""
        with self.part(name):
            self._whole = name
            try:
                yield
            finally:
                self._whole = None

    def enter(self, name: str) -> None:
        now = time.perf_counter()
        name = self._whole or name
        if self._open:
            self.seconds[self._open[-1][0]] += now - self._mark
        self._open.append((name, now))
        self._mark = now

    def leave(self) -> None:
        now = time.perf_counter()
        name, start = self._open.pop()
        self.seconds[name] += now - self._mark
        self._mark = now
        if self.listener is not None:
            self.listener.hear(name, start, now)


class Part:
    """One part of a stopwatch, for `with`."""

    __slots__ = ("_name", "_watch")

    def __init__(self, watch: Stopwatch, name: str) -> None:
        self._watch = watch
        self._name = name

    def __enter__(self) -> None:
        self._watch.enter(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.leave()
