"""Files and batches behind their routes, with real models: what tests talk to. A header says who asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from jobs import Rows, engine_options
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.core import SamplingParams
from headrace.options import ServeOptions
from headrace.server.batch_run import BatchSettings
from headrace.server.batches import Batches, batch_routes
from headrace.server.errors import ApiError, error_response
from headrace.server.files import file_routes
from headrace.server.models import Models
from headrace.server.store import Store

SETTINGS = BatchSettings(lambda llm: SamplingParams(max_tokens=4))
DONE = ("completed", "failed", "cancelled", "expired")


class Owners:
    """Takes the header x-owner for the name of the key."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            owner = dict(scope["headers"]).get(b"x-owner", b"").decode()
            scope.setdefault("state", {})["owner"] = owner
        await self.app(scope, receive, send)


def build_app(folder: Path, model: Path, **options: Any) -> Starlette:
    @asynccontextmanager
    async def live(app: Starlette) -> AsyncIterator[None]:
        models = Models(engine_options(model, **options), ServeOptions())
        batches = Batches(Store(folder), models, SETTINGS)
        app.state.service = SimpleNamespace(batches=batches, models=models)
        models.start()
        batches.start()
        yield
        await run_in_threadpool(batches.close)
        await models.close()

    def answer_error(http: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error)

    app = Starlette(
        routes=[*file_routes(), *batch_routes()], exception_handlers={ApiError: answer_error}, lifespan=live
    )
    app.add_middleware(Owners)
    return app


@contextmanager
def open_client(folder: Path, model: Path, **options: Any) -> Iterator[TestClient]:
    with TestClient(build_app(folder, model, **options)) as client:
        yield client


def batches_of(client: TestClient) -> Batches:
    batches: Batches = client.app.state.service.batches  # type: ignore[attr-defined]
    return batches


def upload(client: httpx.Client, content: bytes, owner: str = "", **fields: str) -> str:
    """The id of a new file."""
    data = {"purpose": "batch"} | fields
    answer = client.post("/v1/files", files={"file": ("in.jsonl", content)}, data=data, headers={"x-owner": owner})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def start_batch(client: httpx.Client, content: bytes, owner: str = "", **fields: Any) -> dict[str, Any]:
    body = {"input_file_id": upload(client, content, owner), "endpoint": "/v1/chat/completions"}
    body |= {"completion_window": "24h"} | fields
    answer = client.post("/v1/batches", json=body, headers={"x-owner": owner})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def watch(client: httpx.Client, batch_id: str, statuses: tuple[str, ...] = DONE, rows: int = 0) -> dict[str, Any]:
    """The batch, as soon as it has one of the statuses and so many rows are answered."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        batch: dict[str, Any] = client.get(f"/v1/batches/{batch_id}").json()
        if batch["status"] in statuses and batch["request_counts"]["completed"] >= rows:
            return batch
        assert batch["status"] not in DONE, batch
        time.sleep(0.01)
    raise AssertionError(f"the batch takes too long: {batch}")


def answer_batches(folder: Path, model: Path, **options: Any) -> None:
    """Run what a data folder has of unfinished batches to its end, without HTTP."""

    async def serve() -> None:
        models = Models(engine_options(model, **options), ServeOptions())
        models.start()
        batches = Batches(Store(folder), models, SETTINGS)
        batches.start()
        while batches.store.unfinished_batches():
            await asyncio.sleep(0.01)
        await run_in_threadpool(batches.close)
        await models.close()

    asyncio.run(serve())


def strip_times(lines: Rows) -> Rows:
    """Lines of an output file without the times of their answers."""
    for line in lines:
        if line["response"] is not None:
            line["response"]["body"].pop("created")
    return lines
