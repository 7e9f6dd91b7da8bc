"""One model's engine in a thread of its own: requests go in from any thread, answers go out as steps end.

Only this thread touches the engine. Knows no wire and no key.
"""

from __future__ import annotations

import logging
import threading
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from queue import Empty, SimpleQueue
from typing import Literal, Protocol

from headrace.core import HeadraceError, Request, RowError
from headrace.engine.engine import Engine
from headrace.engine.outputs import RequestOutput
from headrace.llm import LLM
from headrace.options import EngineOptions
from headrace.server.exchange import Exchange
from headrace.server.pace import Pace
from headrace.server.turns import Turns

LOG = logging.getLogger("headrace.server")
# So long may commands keep a step waiting: clients who come and go without end must not stop those who are answered.
OBEY_SECONDS = 0.1
Command = Callable[[], None]


class WorkerClosed(HeadraceError):
    """The worker takes nothing any more. Made anew each time: an error that was raised keeps alive what was at work."""

    def __init__(self) -> None:
        super().__init__("the model has just been freed, or the server is closing: ask again")


class Receiver(Protocol):
    """Whoever wants a request's answer. Called in the worker's thread, so it must be quick."""

    def finish(self, output: RequestOutput) -> None: ...

    def fail(self, error: BaseException) -> None: ...


class Worker:
    """Loads a model in its thread and computes until it is closed. `ready` is the LLM, or why there is none: it could
    not be loaded, or a fault has ended the thread.

    `exchanges` are the interactive requests in the engine; other receivers (batches) are told of ends only. `held` is
    the event loop's own count of continuations that it has asked for and not done with.
    """

    def __init__(self, options: EngineOptions, pace: Pace, loop: AbstractEventLoop, turns: Turns) -> None:
        self.options = options
        self.ready: Future[LLM] = Future()
        self.exchanges: dict[str, Exchange] = {}
        self.others: dict[str, Receiver] = {}
        self.last_used = time.monotonic()
        self.held = 0
        self._pace = pace
        self._loop = loop
        self._turns = turns
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._phase: Literal["open", "closing", "closed"] = "open"
        self._thread = threading.Thread(target=self._run, name=f"headrace {options.model}", daemon=True)
        self._thread.start()

    def submit(self, request: Request, receiver: Exchange | Receiver) -> None:
        """Bring a request, whose id nobody else has, to the engine between two steps. It fails if that is closed."""
        self._commands.put(lambda: self._add(request, receiver))
        # Looked at after the put: what came before the flag was set, the worker's last look at its commands finds.
        if self._phase == "closed":
            self._refuse(receiver, WorkerClosed())

    def cancel(self, request_id: str) -> None:
        """Take a request out between two steps; then its receiver hears nothing more. Unknown ids are ignored."""
        self._commands.put(lambda: self._abort(request_id))

    def call(self, command: Callable[[Engine], None]) -> None:
        """Let the worker's thread do something quick with its engine between two steps, after all that came before."""
        self._commands.put(lambda: command(self.ready.result().engine))

    def close(self) -> None:
        """Stop after the current step, fail what is left, free the model. Waits for it."""
        self._commands.put(self._stop)
        self._thread.join()

    @property
    def llm(self) -> LLM | None:
        """The model where it can be asked: not before it is loaded, nor after a fault."""
        ready = self.ready  # looked at once: a fault puts another in its place
        return ready.result() if ready.done() and ready.exception() is None else None

    @property
    def idle(self) -> bool:
        return not self.exchanges and not self.others

    def _stop(self) -> None:
        if self._phase == "open":
            self._phase = "closing"

    def _run(self) -> None:
        try:
            llm = LLM(**asdict(self._pace.fit(self.options)))
            self._pace.take(llm.engine)
        except BaseException as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(llm)
        with llm:
            try:
                while self._phase == "open":
                    self._obey(wait=not llm.engine.unfinished)
                    if llm.engine.unfinished and self._phase == "open":
                        self._step(llm.engine)
            except BaseException:
                LOG.exception("the engine of %s has ended", self.options.model)
                broken: Future[LLM] = Future()
                broken.set_exception(HeadraceError("its engine has ended; the server's log says why"))
                self.ready = broken
            self._phase = "closed"
            for command in self._commands_now():
                with suppress(BaseException):  # whatever is wrong with the engine: the next may be a request
                    command()
            self._fail_all(WorkerClosed())

    def _obey(self, wait: bool) -> None:
        """Carry out the commands that have come, or those of the first OBEY_SECONDS; with `wait`, at least one."""
        if wait:
            self._commands.get()()
        until = time.monotonic() + OBEY_SECONDS
        for command in self._commands_now():
            command()
            if time.monotonic() >= until:
                break

    def _commands_now(self) -> Iterator[Command]:
        with suppress(Empty):
            while True:
                yield self._commands.get_nowait()

    def _step(self, engine: Engine) -> None:
        changed: list[Exchange] = []
        try:
            with self._turns.take():
                self._pace.shift(engine, bool(self.exchanges))
                finished = engine.step()
            for output in finished:
                self._finish(output, changed)
            changed += [each for name, each in self.exchanges.items() if self._read(engine, name, each)]
        except BaseException as error:
            # A fault of ours, or no memory: those who are here hear of it, those who come find an empty engine.
            LOG.exception("a step of %s failed", self.options.model)
            engine.abort_all(self._fail_all(tame(error)))
        finally:
            self._wake(changed)

    def _read(self, engine: Engine, name: str, exchange: Exchange) -> bool:
        """Whether a request that goes on has said more."""
        outputs = engine.peek(name)
        if exchange.timing.begun is None and engine.has_begun(name):
            exchange.timing.begun = time.perf_counter()
            self._pace.patience.note_wait(exchange.timing.begun - exchange.timing.submitted)
        return exchange.advance(outputs)

    def _finish(self, output: RequestOutput, changed: list[Exchange]) -> None:
        """Hand an answer over. Only then is its receiver done with: one that cannot take it is to hear of the fault."""
        self.last_used = time.monotonic()
        exchange = self.exchanges.get(output.request_id)
        if exchange is None:
            self.others[output.request_id].finish(output)
            del self.others[output.request_id]
        else:
            exchange.finish(output)
            del self.exchanges[output.request_id]
            changed.append(exchange)

    def _add(self, request: Request, receiver: Exchange | Receiver) -> None:
        if self._phase == "closed":
            self._refuse(receiver, WorkerClosed())
            return
        if isinstance(receiver, Exchange) and receiver.dropped:
            return
        self.last_used = time.monotonic()
        try:
            self._pace.patience.note_arrival(request)
            self.ready.result().engine.add(request)
        except BaseException as error:
            if not isinstance(error, (RowError, ValueError)):
                LOG.exception("%s cannot take a request", self.options.model)
            self._refuse(receiver, tame(error))
            return
        if isinstance(receiver, Exchange):
            self.exchanges[request.id] = receiver
        else:
            self.others[request.id] = receiver

    def _refuse(self, receiver: Exchange | Receiver, error: Exception) -> None:
        receiver.fail(error)
        if isinstance(receiver, Exchange):
            self._wake([receiver])

    def _abort(self, request_id: str) -> None:
        if self.exchanges.pop(request_id, None) or self.others.pop(request_id, None):
            self.ready.result().engine.abort(request_id)

    def _fail_all(self, error: Exception) -> list[str]:
        """Fail everybody who is here; the ids of the requests, which the engine may still have."""
        exchanges, receivers = list(self.exchanges.values()), self.exchanges | self.others
        self.exchanges.clear()
        self.others.clear()
        for receiver in receivers.values():
            receiver.fail(error)
        self._wake(exchanges)
        return list(receivers)

    def _wake(self, exchanges: list[Exchange]) -> None:
        """One call into the event loop for all that a step has changed."""
        if exchanges:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(wake_all, exchanges)


def tame(error: BaseException) -> Exception:
    """The error as those who catch an Exception see it: a panic in a Rust library is none."""
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")


def wake_all(exchanges: list[Exchange]) -> None:
    for exchange in exchanges:
        exchange.wake()
