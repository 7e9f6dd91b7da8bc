"""A batch's requests on their way through a worker, whose engine computes in a thread of its own. Knows no row.

Answers wait in a queue until the batch's thread takes them, so the worker never waits for a disk.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from queue import Empty, SimpleQueue

from headrace.core import HeadraceError, Request, RowError
from headrace.engine.outputs import RequestOutput
from headrace.engine.structure import Matcher
from headrace.meter.stopwatch import Stopwatch
from headrace.server.worker import Worker, WorkerClosed

# Rows, and memory for them, that the schedule sees at once, to find which of them share a prefix.
WINDOW, WINDOW_BYTES = 2048, 96 * 2**20
# How often a request may be lost with a step that failed, before it is tried with none of its batch beside it.
TRIES = 2
# Seconds to wait for the end of the worker's step; after that it is taken to be gone.
PATIENCE = 120.0


class WorkerGone(HeadraceError):
    """The worker was closed while the batch had requests there."""


class Waiter:
    """A request and the receiver of its answer. Called in the worker's thread.

    It keeps what was compiled for the request until that is answered: the engine's thread finds it when it comes there.
    """

    __slots__ = ("_answers", "_matcher", "request")

    def __init__(self, request: Request, answers: SimpleQueue[Answer], matcher: Matcher | None) -> None:
        self.request = request
        self._answers = answers
        self._matcher = matcher

    def finish(self, output: RequestOutput) -> None:
        self._answers.put((self, output))

    def fail(self, error: BaseException) -> None:
        self._answers.put((self, error))


Answer = tuple[Waiter, RequestOutput | BaseException]


class WorkerInlet:
    """An inlet (see `job.inlet`) into a worker, for one thread. Requests are known outside by their rows' ids.

    Rows are gathered to a window, which `release` brings to the worker as one, so that they are planned together.
    """

    def __init__(self, worker: Worker, batch_id: str, owner: str) -> None:
        llm = worker.ready.result()
        self.context_length = llm.context_length
        self.watch = Stopwatch()
        self._worker = worker
        self._batch_id = batch_id
        self._owner = owner
        self._engine = llm.engine
        self._few = 4 * llm.options.max_sequences
        self._filling = True
        self._gathered: list[Waiter] = []
        self._away: dict[str, int] = {}
        self._alone: deque[Waiter] = deque()
        self._answers: SimpleQueue[Answer] = SimpleQueue()

    def add(self, request: Request) -> None:
        """Gather a request. What its engine has against it comes as an answer.

        Raises RowError for a constraint that cannot be used: here, for the engine's thread should not wait for it.
        """
        params, matcher = request.params, None
        if params.constraint is not None:
            matcher = self._engine.compiler.open_matcher(params.constraint)
        if params.seed is None and not params.greedy:
            # A row draws the same numbers in every batch: they must not depend on the batch's id, which is random.
            digest = blake2b(f"{self._engine.seed}\0{request.id}".encode(), digest_size=8).digest()
            params = replace(params, seed=int.from_bytes(digest) >> 1)
        name = f"{self._batch_id}/{request.id}"
        request = replace(request, id=name, params=params, background=True, owner=self._owner)
        self._gathered.append(Waiter(request, self._answers, matcher))

    def wants(self, held_bytes: int) -> bool:
        """See Inlet."""
        present = len(self._away) + len(self._gathered)
        most = min(WINDOW_BYTES, self._worker.options.window_bytes)
        if self._filling:
            self._filling = present == 0 or (present < max(WINDOW, self._few) and held_bytes < most)
        else:
            self._filling = present == 0 or (present < self._few and held_bytes < most // 2)
        return self._filling and not self._isolating

    @property
    def _isolating(self) -> bool:
        """Whether some request is, or will be, alone in the worker: no other may join it."""
        return bool(self._alone) or TRIES in self._away.values()

    def release(self) -> None:
        """Bring what has been gathered to the worker, as soon as it may join what is there."""
        if self._isolating:
            return
        for waiter in self._gathered:
            self._submit(waiter, tries=0)
        self._gathered.clear()

    def take(self, seconds: float) -> list[RequestOutput]:
        """The answers that have come, waiting so long for the first. Raises WorkerGone."""
        found: list[RequestOutput] = []
        with suppress(Empty):
            self._read(self._answers.get(timeout=seconds), found)
            while True:
                self._read(self._answers.get_nowait(), found)
        if self._alone and not self._away:
            self._submit(self._alone.popleft(), TRIES)
        return found

    def withdraw(self) -> list[RequestOutput]:
        """Take everything out of the worker; the answers that had come before. The inlet is of no use after it."""
        if self._away:
            for name in self._away:
                self._worker.cancel(name)
            done = threading.Event()
            self._worker.call(lambda engine: done.set())
            done.wait(PATIENCE)
        found = []
        with suppress(Empty):
            while True:
                waiter, output = self._answers.get_nowait()
                if isinstance(output, RequestOutput):
                    found.append(replace(output, request_id=self._row_of(waiter.request)))
        return found

    def _submit(self, waiter: Waiter, tries: int) -> None:
        self._away[waiter.request.id] = tries
        self._worker.submit(waiter.request, waiter)

    def _read(self, answer: Answer, found: list[RequestOutput]) -> None:
        waiter, output = answer
        request = waiter.request
        tries = self._away.pop(request.id)
        if isinstance(output, RequestOutput):
            found.append(replace(output, request_id=self._row_of(request)))
        elif isinstance(output, RowError):
            found.append(self._fail(request, output))
        elif isinstance(output, WorkerClosed):
            self._away.clear()
            raise WorkerGone(str(output))
        elif tries >= TRIES:
            message = f"the server cannot compute this row: {type(output).__name__}: {output}"
            found.append(self._fail(request, RowError("server_error", message)))
        elif tries == TRIES - 1:
            self._alone.append(waiter)
        else:
            self._submit(waiter, tries + 1)

    def _fail(self, request: Request, error: RowError) -> RequestOutput:
        return RequestOutput(self._row_of(request), None, list(request.prompt_token_ids), [], error=error)

    def _row_of(self, request: Request) -> str:
        return request.id.removeprefix(f"{self._batch_id}/")
