"""The models that a server has: loaded when first asked for, freed when nobody has asked for long. Knows no wire."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Lock

from headrace.cache.policies.choice import spell_policy
from headrace.checkpoint import open_checkpoint
from headrace.core import HeadraceError, InputError
from headrace.engine.memory import read_available_bytes
from headrace.llm import LLM
from headrace.options import EngineOptions, ServeOptions
from headrace.plan.site import open_site
from headrace.server.errors import ApiError
from headrace.server.names import find_name, name_served
from headrace.server.pace import Pace
from headrace.server.turns import Turns
from headrace.server.worker import Worker

LOG = logging.getLogger("headrace.server")
# Seconds between two looks for models that nobody uses.
LOOK = 5.0


class Models:
    """Workers by the names that clients give. The first model stays; further ones come and go.

    A model under a further KV policy is a further model, MODEL:POLICY: it has an engine and a KV cache of its own.
    Weights that are kept packed are mapped from their file, so both read the same memory.

    Belongs to the event loop, but for `open_worker`, `find` and `hold`, which batches call from their threads.
    """

    def __init__(self, engine: EngineOptions, serve: ServeOptions) -> None:
        """Raises InputError where two models have one name, and for KV policies that cannot serve their models."""
        also = serve.also
        self.options = {name_served(each): replace(engine, model=each) for each in (engine.model, *also)}
        if len(self.options) != 1 + len(also):
            raise InputError(f"two of the models have one name: {', '.join(map(name_served, (engine.model, *also)))}")
        self.first = next(iter(self.options))
        # Those without a policy in their names: only they have other names too.
        self._plain = list(self.options)
        policies = dict.fromkeys(spell_policy(each) for each in serve.kv_also)
        self.options |= {
            f"{name}:{kv}": replace(options, kv=kv) for name, options in self.options.items() for kv in policies
        }
        # Caches touch their memory as they fill, so what is free says nothing of what others were promised: all that
        # may be loaded share alike.
        share = engine.kv_memory_share / len(self.options)
        self.options = {name: replace(options, kv_memory_share=share) for name, options in self.options.items()}
        for options in self.options.values() if policies else ():
            # Refuses, before anything is loaded, what cannot serve its model.
            open_site(options, open_checkpoint(options.model))
        self.workers: dict[str, Worker] = {}
        self._serve = serve
        self._turns = Turns()
        self._holds: Counter[str] = Counter()
        self._guard = Lock()
        self._opening = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to load the first model. Call in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.workers[self.first] = Worker(self.options[self.first], Pace(self._serve), self._loop, self._turns)

    async def open(self, name: str | None) -> tuple[str, Worker, LLM]:
        """The worker of a model, loaded if it is not here. Raises ApiError for a name that is not served."""
        name = self.find(name)
        async with self._opening:
            worker = self.workers.get(name)
            if worker is None:
                await self._make_room(name)
                assert self._loop is not None  # start was called
                worker = self.workers[name] = Worker(self.options[name], Pace(self._serve), self._loop, self._turns)
        worker.last_used = time.monotonic()
        try:
            return name, worker, await asyncio.shield(asyncio.wrap_future(worker.ready))
        except Exception as error:
            # Others wait for it too, and the first of them may have been followed by one who tries again.
            if name != self.first and self.workers.get(name) is worker:
                del self.workers[name]
            if not isinstance(error, HeadraceError):
                raise
            raise ApiError(503, "model_unavailable", f"{name} cannot answer: {error}") from error

    def find(self, name: str | None) -> str:
        """The served name that a client means; the first model where it names none. Raises ApiError for another."""
        found = find_name(name, self.options) if name else self.first
        if found is not None:
            return found
        for served in self._plain:
            worker = self.workers.get(served)
            llm = None if worker is None else worker.llm
            if name == self.options[served].model or (llm is not None and name == llm.model_name):
                return served
        known = ", ".join(self.options)
        raise ApiError(404, "model_not_found", f"model {name!r:.80} is not served here; {known} is", "model")

    def loaded(self) -> Iterator[tuple[str, Worker, LLM]]:
        """What is loaded at the moment."""
        for name, worker in self.workers.items():
            if (llm := worker.llm) is not None:
                yield name, worker, llm

    def open_worker(self, name: str) -> Worker:
        """Like `open`, for other threads than the event loop's. Raises InputError for a name that is not served."""
        assert self._loop is not None  # start was called
        try:
            return asyncio.run_coroutine_threadsafe(self.open(name), self._loop).result()[1]
        except ApiError as error:
            raise InputError(str(error)) from None

    def known_models(self) -> list[str]:
        return list(self.options)

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Keep a model from being freed."""
        with self._guard:
            self._holds[name] += 1
        try:
            yield
        finally:
            with self._guard:
                self._holds[name] -= 1

    async def free_idle(self) -> None:
        """Free further models that nobody has used for long, for ever."""
        while True:
            await asyncio.sleep(LOOK)
            # Asked anew after each: while one is freed, requests begin, and `_make_room` frees others.
            while (idle := self._idle()) and time.monotonic() - idle[0][1].last_used > self._serve.idle_seconds:
                await self._free(idle[0][0])

    async def close(self) -> None:
        while self.workers:
            await self._free(next(iter(self.workers)))

    def _idle(self) -> list[tuple[str, Worker]]:
        """Further models that have nothing to do, the longest unused first."""
        found = [
            (name, worker)
            for name, worker in self.workers.items()
            if name != self.first and worker.ready.done() and worker.idle and not worker.held and not self._holds[name]
        ]
        return sorted(found, key=lambda pair: pair[1].last_used)

    async def _make_room(self, name: str) -> None:
        """Free idle models, the longest unused first, until this one's weights would fit twice."""
        with suppress(HeadraceError):  # what is wrong with it, loading says
            needed = 2 * (await asyncio.to_thread(open_checkpoint, self.options[name].model)).nbytes
            # Asked anew after each, as in `free_idle`.
            while (idle := self._idle()) and read_available_bytes() < needed:
                await self._free(idle[0][0])

    async def _free(self, name: str) -> None:
        worker = self.workers.pop(name)
        await asyncio.to_thread(worker.close)
        LOG.info("freed %s", name)
