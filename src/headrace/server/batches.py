"""`/v1/batches`, and the queue of batches behind it."""

from __future__ import annotations

import logging
import re
import sqlite3
import threading
from queue import SimpleQueue
from typing import Annotated, Any, Literal

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from headrace.job.batch_rows import ENDPOINTS
from headrace.job.stop import DISK_ERRORS
from headrace.server.batch_object import Batch, describe_page
from headrace.server.batch_run import BatchRun, BatchSettings, Closing, Models
from headrace.server.errors import ApiError
from headrace.server.limits import parse_json
from headrace.server.store import Page, Store, make_id, now, refuse_full_disk

LOG = logging.getLogger("headrace.server")
# Batches that are answered at the same time; the others wait in the order in which they came.
MOST_RUNNING = 2
# Seconds after which a batch tries again that the disk has refused, or whose worker went away.
PAUSE = 10.0
WINDOW = 24 * 3600
SHOWN = 20
MOST_PAIRS, MOST_KEY, MOST_VALUE = 16, 64, 512
# Batches that wait for a thread; None ends it.
Queue = SimpleQueue[BatchRun | None]


class ExpiresAfter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long the output files are kept, in seconds."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, msgspec.Meta(ge=3600, le=2_592_000)]


class CreateBatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request for a batch."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


class Batches:
    """All batches of a server. Any thread but the event loop's may call any method; `start` once, before, and `close`
    once, after.

    Close it before the workers: what they have answered until then is kept.
    """

    def __init__(self, store: Store, models: Models, settings: BatchSettings) -> None:
        """The store is closed with it."""
        self.store = store
        self._models = models
        self._settings = settings
        self._closing = threading.Event()
        self._runs: dict[str, BatchRun] = {}
        self._turns: Queue = SimpleQueue()
        # A batch that is cancelled before its turn does not wait for it.
        self._ends: Queue = SimpleQueue()
        queues = [*[self._turns] * MOST_RUNNING, self._ends]
        self._threads = [threading.Thread(target=self._work, args=(queue,), daemon=True) for queue in queues]

    def start(self) -> None:
        """Go on with what an earlier process has not finished."""
        for batch in self.store.unfinished_batches():
            self._enqueue(batch)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Save what is finished and stop; the rest goes on at the next start. Waits for the engines' current steps."""
        self._closing.set()
        for queue in (self._turns, self._ends):
            for _ in self._threads:
                queue.put(None)
        for thread in self._threads:
            thread.join()
        self.store.close()

    def add(self, batch: Batch) -> None:
        """Keep a new batch and begin it when its turn comes. Raises ApiError."""
        self.store.add_batch(batch)
        self._enqueue(batch)

    def cancel(self, owner: str, batch_id: str) -> Batch:
        """Raises ApiError 404, and 409 for a batch that is past cancelling."""
        self.store.find_batch(owner, batch_id)
        with refuse_full_disk():
            batch = self.store.change_batch(batch_id, begin_cancelling)
        run = self._runs.get(batch_id)
        if run is not None:
            run.cancel.set()
            self._ends.put(run)
        return batch

    def describe(self) -> list[dict[str, Any]]:
        """The newest batches of all owners, for those who run the server."""
        batches, _ = self.store.list_batches(None, Page(SHOWN))
        return [self._describe(batch) for batch in batches]

    def count(self) -> dict[str, int]:
        """How many batches have which status."""
        return self.store.count_batches()

    def _describe(self, batch: Batch) -> dict[str, Any]:
        run = self._runs.get(batch.id)
        left = batch.total - batch.completed - batch.failed
        moving = run is not None and run.rate > 0 and batch.status == "in_progress"
        return {
            "id": batch.id,
            "status": batch.status,
            "total": batch.total,
            "completed": batch.completed,
            "failed": batch.failed,
            "seconds_left": round(left / run.rate, 1) if run is not None and moving else None,
        }

    def _enqueue(self, batch: Batch) -> None:
        run = BatchRun(self.store, self._models, self._settings, batch, self._closing)
        self._runs[batch.id] = run
        self._turns.put(run)

    def _work(self, queue: Queue) -> None:
        while (run := queue.get()) is not None:
            self._take_turn(run)

    def _take_turn(self, run: BatchRun) -> None:
        """Run a batch to its end, or until the server closes; nothing where another thread does so or has done so."""
        if not run.claim():
            return
        try:
            while not self._closing.is_set() and not self._try(run):
                self._closing.wait(PAUSE)
        except Exception:
            LOG.exception("%s cannot be ended; it goes on when the server is started again", run.batch.id)
        finally:
            self._runs.pop(run.batch.id, None)

    def _try(self, run: BatchRun) -> bool:
        """Whether the batch has come to its end; else to be tried again."""
        try:
            run.run()
        except Closing:
            return False
        except Exception as error:
            if is_disk_error(error):
                LOG.warning("%s waits, for the disk refuses: %s", run.batch.id, error)
                return False
            LOG.exception("%s failed", run.batch.id)
            # A fault of ours: its owner is told, and has what was answered.
            run.fail("server_error", f"the server cannot run this batch: {type(error).__name__}: {error}")
            run.run()
        return True


def is_disk_error(error: Exception) -> bool:
    return isinstance(error, sqlite3.OperationalError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS)


def begin_cancelling(batch: Batch) -> Batch:
    if batch.status == "cancelling":
        return batch
    if batch.status not in ("validating", "in_progress"):
        raise ApiError(409, "batch_not_cancellable", f"{batch.id} is {batch.status}, so it cannot be cancelled")
    return batch.become("cancelling", now())


def read_body(value: dict[str, Any]) -> CreateBatch:
    """Raises ApiError, naming the field."""
    try:
        body = msgspec.convert(value, CreateBatch)
    except msgspec.ValidationError as error:
        place = re.search(r"`\$\.?([^`[]+)|field `([^`]+)`", str(error))
        param = (place[1] or place[2]) if place else None
        raise ApiError(400, "invalid_value", f"{param or 'the body'}: {error}", param) from None
    if body.endpoint not in ENDPOINTS:
        message = f"endpoint must be {' or '.join(ENDPOINTS)}, got {body.endpoint!r:.80}"
        raise ApiError(400, "unsupported_endpoint", message, "endpoint")
    pairs = body.metadata or {}
    if len(pairs) > MOST_PAIRS or any(len(key) > MOST_KEY or len(pairs[key]) > MOST_VALUE for key in pairs):
        message = f"metadata may have {MOST_PAIRS} pairs, keys of {MOST_KEY} and values of {MOST_VALUE} characters"
        raise ApiError(400, "invalid_value", message, "metadata")
    return body


def create(batches: Batches, owner: str, body: CreateBatch) -> Batch:
    file = batches.store.find_file(owner, body.input_file_id)
    if file.purpose != "batch":
        message = f"{file.id} was uploaded for {file.purpose}: upload it with the purpose batch"
        raise ApiError(400, "invalid_purpose", message, "input_file_id")
    created, keep = now(), body.output_expires_after
    batch = Batch(
        id=make_id("batch_"),
        owner=owner,
        endpoint=body.endpoint,
        input_file_id=file.id,
        created_at=created,
        expires_at=created + WINDOW,
        metadata=body.metadata,
        keep_seconds=None if keep is None else keep.seconds,
    )
    batches.add(batch)
    return batch


def find_batches(http: HttpRequest) -> tuple[Batches, str]:
    """The server's batches, and the name of who asks ("" where keys are off)."""
    owner: str = http.scope.get("state", {}).get("owner", "")
    return http.app.state.service.batches, owner


def read_page(http: HttpRequest, limit: int, most: int) -> Page:
    """Which part of a list is asked for. Raises ApiError."""
    query = http.query_params
    text, order = query.get("limit", str(limit)), query.get("order", "desc")
    if len(text) > 9 or not text.isdecimal() or not 1 <= int(text) <= most:
        raise ApiError(
            400, "invalid_value", f"limit must be a whole number from 1 to {most}, got {text!r:.40}", "limit"
        )
    if order not in ("asc", "desc"):
        raise ApiError(400, "invalid_value", f"order must be asc or desc, got {order!r:.40}", "order")
    return Page(int(text), query.get("after"), order == "asc")


async def create_batch(http: HttpRequest) -> Response:
    batches, owner = find_batches(http)
    body = read_body(parse_json(await http.body()))
    return JSONResponse((await run_in_threadpool(create, batches, owner, body)).describe())


async def list_batches(http: HttpRequest) -> Response:
    batches, owner = find_batches(http)
    found, more = await run_in_threadpool(batches.store.list_batches, owner, read_page(http, 20, 100))
    return JSONResponse(describe_page([batch.describe() for batch in found], more))


async def retrieve_batch(http: HttpRequest) -> Response:
    batches, owner = find_batches(http)
    found = await run_in_threadpool(batches.store.find_batch, owner, http.path_params["batch"])
    return JSONResponse(found.describe())


async def cancel_batch(http: HttpRequest) -> Response:
    batches, owner = find_batches(http)
    found = await run_in_threadpool(batches.cancel, owner, http.path_params["batch"])
    return JSONResponse(found.describe())


def batch_routes() -> list[Route]:
    return [
        Route("/v1/batches", create_batch, methods=["POST"]),
        Route("/v1/batches", list_batches, methods=["GET"]),
        Route("/v1/batches/{batch}", retrieve_batch, methods=["GET"]),
        Route("/v1/batches/{batch}/cancel", cancel_batch, methods=["POST"]),
    ]
