"""A worker and what goes into it, without HTTP: what it need not do again, and what happens when something breaks."""

from __future__ import annotations

import asyncio
import resource
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from jobs import engine_options

from headrace.core import Constraint, HeadraceError, Request, SamplingParams
from headrace.engine.engine import Engine
from headrace.engine.outputs import RequestOutput
from headrace.engine.structure import CACHED_GRAMMARS, HARMLESS_CHARACTERS
from headrace.options import SamplingOptions, ServeOptions
from headrace.server.app import build_app
from headrace.server.batch_inlet import WorkerGone, WorkerInlet
from headrace.server.models import Models
from headrace.server.pace import Pace
from headrace.server.service import Service
from headrace.server.turns import Turns
from headrace.server.worker import Worker


@contextmanager
def open_worker(model: Path, **options: Any) -> Iterator[Worker]:
    loop = asyncio.new_event_loop()
    worker = Worker(engine_options(model, **options), Pace(ServeOptions()), loop, Turns())
    try:
        worker.ready.result(60)
        yield worker
    finally:
        worker.close()
        loop.close()


def count_child_faults() -> int:
    """A long grammar is tried in a process of its own, which shows in the page faults of children."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt


def test_what_a_batch_has_compiled_the_engine_does_not_compile_again(tiny_model: Path) -> None:
    with open_worker(tiny_model) as worker:
        inlet, compiler = WorkerInlet(worker, "batch", ""), worker.ready.result().engine.compiler
        long = Constraint("regex", "(" + "a" * HARMLESS_CHARACTERS + ")?b")
        constraints = [long, *(Constraint("regex", f"{number}b") for number in range(CACHED_GRAMMARS))]
        for number, constraint in enumerate(constraints):
            inlet.add(Request(str(number), (5, 6), SamplingParams(max_tokens=2, constraint=constraint)))
        faults = count_child_faults()
        assert faults > 0 and not compiler.is_slow(long)
        found: list[RequestOutput] = []
        inlet.release()
        while len(found) < len(constraints):
            found += inlet.take(10)
        assert count_child_faults() == faults and not any(output.error for output in found)
        # Nobody has it any more, so it is forgotten as before.
        others = [Constraint("regex", f"{number}c") for number in range(CACHED_GRAMMARS)]
        assert all(compiler.open_matcher(other) for other in others) and compiler.is_slow(long)


class Panic(BaseException):
    """What a Rust library raises where it has a fault."""


def ask(inlet: WorkerInlet, name: str, **params: Any) -> RequestOutput:
    inlet.add(Request(name, (5, 6), SamplingParams(**params)))
    inlet.release()
    for _ in range(100):
        if found := inlet.take(0.1):
            return found[0]
    raise AssertionError(f"nobody has answered {name}")


def break_at(monkeypatch: pytest.MonkeyPatch, method: str, error: type[BaseException]) -> None:
    """Let a method of Worker or Engine fail for requests that are called poison."""
    owner = Engine if method == "add" else Worker
    original: Callable[..., Any] = getattr(owner, method)

    def fall(self: Any, first: Any, *others: Any) -> Any:
        if "poison" in (first.id if isinstance(first, Request) else first.request_id):
            raise error
        return original(self, first, *others)

    monkeypatch.setattr(owner, method, fall)


@pytest.mark.parametrize("method", ["add", "_finish"])
@pytest.mark.parametrize("error", [MemoryError, Panic])
def test_a_fault_beside_a_step_fails_its_row_alone(
    method: str, error: type[BaseException], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, method, error)
    with open_worker(tiny_model) as worker:
        inlet = WorkerInlet(worker, "batch", "")
        poison = ask(inlet, "poison", max_tokens=2)
        assert poison.error is not None and error.__name__ in str(poison.error)
        assert ask(inlet, "plain", max_tokens=2).error is None and worker.idle


def break_engine(engine: Engine) -> None:
    raise Panic("a fault where none is looked for")


def test_a_batch_hears_that_its_worker_has_ended(tiny_model: Path) -> None:
    with open_worker(tiny_model) as worker:
        inlet = WorkerInlet(worker, "batch", "")
        inlet.add(Request("long", (5, 6), SamplingParams(max_tokens=500, ignore_eos=True)))
        inlet.release()
        worker.call(break_engine)
        with pytest.raises(WorkerGone):
            inlet.take(10)
        inlet.add(Request("late", (5, 6), SamplingParams(constraint=Constraint("regex", "a"))))
        inlet.release()
        with pytest.raises(WorkerGone):
            inlet.take(10)
        assert inlet.withdraw() == []
        assert isinstance(worker.ready.exception(), HeadraceError)


def test_commands_without_end_keep_no_request_from_its_answer(tiny_model: Path) -> None:
    with open_worker(tiny_model) as worker:
        inlet, endless = WorkerInlet(worker, "batch", ""), [True]

        def bring_another(engine: Engine) -> None:
            if endless:
                worker.call(bring_another)

        worker.call(bring_another)
        try:
            assert ask(inlet, "plain", max_tokens=2).error is None
        finally:
            endless.clear()


@asynccontextmanager
async def open_service(model: Path, folder: Path) -> AsyncIterator[tuple[httpx.AsyncClient, Worker]]:
    """The whole application, and the worker of its model."""
    options = ServeOptions(data=str(folder))
    models = Models(engine_options(model), options)
    service = Service(options, SamplingOptions(), models)
    models.start()
    app = build_app(service)
    async with app.router.lifespan_context(app):
        await asyncio.wrap_future(models.workers[models.first].ready)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client:
            yield client, models.workers[models.first]


BODY = {"prompt": [5, 6], "max_tokens": 500, "ignore_eos": True}


def test_those_who_wait_for_a_worker_that_ends_hear_of_it_and_it_is_not_ready(tiny_model: Path, tmp_path: Path) -> None:
    async def act() -> None:
        async with open_service(tiny_model, tmp_path) as (client, worker):
            assert (await client.get("/ready")).status_code == 200
            waiting = asyncio.create_task(client.post("/v1/completions", json=BODY))
            while not worker.exchanges:
                await asyncio.sleep(0)
            worker.call(break_engine)
            assert (await waiting).status_code == 503
            ready = await client.get("/ready")
            assert ready.status_code == 503 and "its engine has ended" in ready.json()["error"]["message"]
            late = await client.post("/v1/completions", json=BODY)
            assert late.status_code == 503 and "its engine has ended" in late.text

    asyncio.run(act())


def test_what_a_request_has_compiled_stays_until_the_engine_wants_it(tiny_model: Path, tmp_path: Path) -> None:
    async def act() -> None:
        async with open_service(tiny_model, tmp_path) as (client, worker):
            compiler, gate = worker.ready.result().engine.compiler, threading.Event()
            long = Constraint("regex", "(" + "a" * HARMLESS_CHARACTERS + ")?b")
            worker.call(lambda engine: gate.wait(60) and None)
            try:
                asking = asyncio.create_task(client.post("/v1/completions", json=BODY | {"guided_regex": long.value}))
                while not worker.held:
                    await asyncio.sleep(0.01)
                for number in range(CACHED_GRAMMARS):
                    await asyncio.to_thread(compiler.open_matcher, Constraint("regex", f"{number}c"))
                assert not compiler.is_slow(long)
            finally:
                gate.set()
            assert (await asking).status_code == 200

    asyncio.run(act())


def test_who_goes_before_the_engine_has_heard_of_him_costs_it_nothing(tiny_model: Path, tmp_path: Path) -> None:
    async def act() -> None:
        async with open_service(tiny_model, tmp_path) as (client, worker):
            gate, seen = threading.Event(), asyncio.Queue[list[str]]()
            loop = asyncio.get_running_loop()
            worker.call(lambda engine: gate.wait(60) and None)
            try:
                asking = asyncio.create_task(client.post("/v1/completions", json=BODY))
                while not worker.held:
                    await asyncio.sleep(0.01)
                worker.call(lambda engine: loop.call_soon_threadsafe(seen.put_nowait, list(worker.exchanges)) and None)
                asking.cancel()
                await asyncio.wait([asking])
                assert worker.held == 0
            finally:
                gate.set()
            assert await seen.get() == []

    asyncio.run(act())


@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses", "messages"])
def test_a_stream_says_that_a_step_has_failed(
    path: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = Engine.step, 0

    def fall(engine: Engine) -> list[RequestOutput]:
        nonlocal steps
        steps += 1
        if steps == 9:
            raise RuntimeError("the wheel broke")
        return step(engine)

    monkeypatch.setattr(Engine, "step", fall)
    bodies: dict[str, dict[str, Any]] = {"completions": BODY, "responses": {"input": "x", "ignore_eos": True}}
    body = bodies.get(path, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 99, "ignore_eos": True})

    async def act() -> None:
        async with open_service(tiny_model, tmp_path) as (client, _):
            answer = await client.post(f"/v1/{path}", json={"stream": True} | body)
            assert answer.status_code == 200
            assert "internal_error" in answer.text or "the server failed" in answer.text, answer.text
            assert "the wheel broke" not in answer.text

    asyncio.run(act())
