"""One request under way: the worker's thread writes what the engine says, the event loop reads it. Knows no wire."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator

from headrace.checkpoint import Tokenizer
from headrace.core import Request
from headrace.engine.deltas import Delta, DeltaReader
from headrace.engine.outputs import CompletionOutput, RequestOutput


class Timing:
    """When things happened to a request, in seconds of time.perf_counter; None until they have."""

    def __init__(self) -> None:
        self.submitted = time.perf_counter()
        self.begun: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.gaps: list[tuple[float, int]] = []
        self.ended: float | None = None

    def note(self, new_tokens: int) -> None:
        """So many tokens have come with the step that ends now."""
        now = time.perf_counter()
        if self.last_token is None:
            self.first_token = now
        else:
            self.gaps.append((now - self.last_token, new_tokens))
        self.last_token = now


class Exchange:
    """Made in the event loop, handed to a worker. `advance` and `finish` are called in the worker's thread, which then
    calls `wake` in the loop; everything else belongs to the loop.

    `dropped`, set in the loop, says that nobody will read it: a worker that has not begun with it leaves it out.
    `written` counts the tokens of the answer so far. A reader that is slow finds more in each piece: what waits for it
    is never more than the answer.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.timing = Timing()
        self.written = 0
        self.dropped = False
        self._readers = [DeltaReader(tokenizer, request.params) for _ in range(request.params.n)]
        self._deltas: deque[Delta] = deque()
        self.output: RequestOutput | None = None
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    @property
    def done(self) -> bool:
        return self.output is not None or self._failure is not None

    # The worker's thread.

    def advance(self, outputs: list[CompletionOutput]) -> bool:
        """Take what the last step added; whether there was anything."""
        deltas = [delta for output in outputs if (delta := self._readers[output.index].read(output)) is not None]
        if deltas:
            self._deltas.extend(deltas)
            tokens = sum(len(delta.token_ids) for delta in deltas)
            self.written += tokens
            self.timing.note(tokens)
        return bool(deltas)

    def finish(self, output: RequestOutput) -> None:
        self.advance(output.outputs)
        self.timing.ended = time.perf_counter()
        self.output = output

    def fail(self, error: BaseException) -> None:
        self.timing.ended = time.perf_counter()
        self._failure = error

    # The event loop.

    def wake(self) -> None:
        self._changed.set()

    async def begun(self) -> None:
        """Until something has been said, or the request has ended or failed. Raises its error."""
        while not self._deltas and not self.done:
            await self._changed.wait()
            self._changed.clear()
        if not self._deltas:
            self._raise_error()

    async def pieces(self, beat: float, ends: float) -> AsyncIterator[list[Delta]]:
        """What has been said, as it comes; an empty list where nothing came for `beat` seconds.

        Raises the request's error, RowError among others, and TimeoutError at `ends`, in the loop's time.
        """
        clock = asyncio.get_running_loop().time
        while True:
            ended = self.done
            deltas = [self._deltas.popleft() for _ in range(len(self._deltas))]
            if deltas:
                yield deltas
            if ended:
                self._raise_error()
                return
            if clock() >= ends:
                raise TimeoutError
            try:
                async with asyncio.timeout_at(min(clock() + beat, ends)):
                    await self._changed.wait()
            except TimeoutError:
                yield []
            self._changed.clear()

    async def result(self) -> RequestOutput:
        """The whole answer. Raises the request's error."""
        while not self.done:
            await self._changed.wait()
            self._changed.clear()
        self._raise_error()
        assert self.output is not None  # done, and not failed
        return self.output

    def _raise_error(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self.output is not None and self.output.error is not None:
            raise self.output.error
