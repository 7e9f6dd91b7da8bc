"""Models that come and go while others are asked for, and what a server frees at its end."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from jobs import engine_options

from headrace.engine.engine import Engine
from headrace.options import SamplingOptions, ServeOptions
from headrace.server import models as models_module
from headrace.server.app import build_app, live
from headrace.server.models import Models
from headrace.server.service import Service


@pytest.fixture(scope="module")
def further(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Paths of b, c and d, which are the same model."""
    folder = tmp_path_factory.mktemp("models")
    for name in "bcd":
        os.symlink(tiny_model, folder / name)
    return tuple(str(folder / name) for name in "bcd")


@asynccontextmanager
async def freeing(
    tiny_model: Path, further: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Models, threading.Event]]:
    """Models of which b and c are loaded and idle and memory is short; b is freed once the event is set."""
    monkeypatch.setattr(models_module, "LOOK", 0.01)
    monkeypatch.setattr(models_module, "read_available_bytes", lambda: 0)
    models, gate = Models(engine_options(tiny_model), ServeOptions(also=further, idle_seconds=0)), threading.Event()
    models.start()

    def stand(engine: Engine) -> None:
        gate.wait(30)

    try:
        with models.hold("b"):
            _, b, _ = await models.open("b")
            await models.open("c")
        b.call(stand)
        yield models, gate
    finally:
        gate.set()
        await models.close()


async def wait_until_gone(models: Models, name: str) -> None:
    async with asyncio.timeout(20):
        while name in models.workers:
            await asyncio.sleep(0.01)


def test_room_is_made_while_an_idle_model_is_freed(
    tiny_model: Path, further: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act() -> None:
        async with freeing(tiny_model, further, monkeypatch) as (models, gate):
            idle = asyncio.create_task(models.free_idle())
            await wait_until_gone(models, "b")
            with models.hold("d"):
                assert (await models.open("d"))[0] == "d" and "c" not in models.workers
                gate.set()
            await wait_until_gone(models, "d")
            assert not idle.done()
            idle.cancel()

    asyncio.run(act())


def test_an_idle_model_is_freed_while_room_is_made(
    tiny_model: Path, further: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act() -> None:
        async with freeing(tiny_model, further, monkeypatch) as (models, gate):
            opening = asyncio.create_task(models.open("d"))
            await wait_until_gone(models, "b")
            idle = asyncio.create_task(models.free_idle())
            await wait_until_gone(models, "c")
            gate.set()
            assert (await opening)[0] == "d"
            idle.cancel()

    asyncio.run(act())


@pytest.mark.parametrize("by_age", [True, False])
def test_a_model_that_is_asked_meanwhile_is_not_freed(
    tiny_model: Path, further: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, by_age: bool
) -> None:
    async def act() -> None:
        async with freeing(tiny_model, further, monkeypatch) as (models, gate):
            task = asyncio.create_task(models.free_idle() if by_age else models.open("d"))
            await wait_until_gone(models, "b")
            models.workers["c"].held += 1
            gate.set()
            await asyncio.wait([task], timeout=0.5 if by_age else 60)
            assert "c" in models.workers
            task.cancel()

    asyncio.run(act())


def test_a_model_that_failed_to_load_is_tried_again(tiny_model: Path, further: tuple[str, ...]) -> None:
    """Also where loading fails in a way that nobody foresaw."""

    async def act() -> None:
        models = Models(engine_options(tiny_model), ServeOptions(also=further))
        models.start()
        right = models.options["b"]
        models.options["b"] = replace(right, kv_dir="\0")
        try:
            failures = await asyncio.gather(*(models.open("b") for _ in range(2)), return_exceptions=True)
            assert [type(each) for each in failures] == [ValueError] * 2
            models.options["b"] = right
            assert (await models.open("b"))[0] == "b"
        finally:
            await models.close()

    asyncio.run(act())


def test_all_is_freed_though_what_ran_beside_the_requests_has_failed(tiny_model: Path, tmp_path: Path) -> None:
    async def act() -> None:
        options = ServeOptions(data=str(tmp_path))
        models = Models(engine_options(tiny_model), options)
        service = Service(options, SamplingOptions(), models)
        del service.stats.history  # so that its first look fails
        models.start()
        async with live(build_app(service)):
            await models.open(None)
            await asyncio.sleep(0)
        assert not models.workers and not any(each.is_alive() for each in service.batches._threads)

    asyncio.run(act())
