"""One batch from its file to its results, in a thread of its own, through the feed and the journal of `headrace run`.

Killed at any instant and run again, it ends with every row answered once: a row counts when the journal has it on the
disk, a status when the store has. Knows no HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from headrace import __version__
from headrace.cache.policies.choice import FULL
from headrace.core import HeadraceError, SamplingParams
from headrace.job.batch_rows import BatchDrafter
from headrace.job.feed import Feed
from headrace.job.intake import COMPUTING, digest
from headrace.job.journal import Finished, Journal, compare
from headrace.job.openai import Unknown
from headrace.job.sources import JsonLines
from headrace.llm import LLM
from headrace.meter.report import list_versions
from headrace.server.batch_check import Findings, check_bodies, check_lines
from headrace.server.batch_end import conclude
from headrace.server.batch_inlet import WorkerGone, WorkerInlet
from headrace.server.batch_object import Batch, BatchError, Ending
from headrace.server.store import Store, now
from headrace.server.worker import Worker

LOG = logging.getLogger("headrace.server")
# A save waits for the disk: so many rows, or so many seconds, share one.
SAVE_ROWS, SAVE_SECONDS = 256, 0.25
# Rows are read a few at a time, with seconds between in which the engine's thread has Python to itself, for which a
# step would otherwise wait after each of its kernels.
READ_ROWS, PAUSE_SECONDS = 32, 0.005
# Seconds between two updates of the counts that clients see.
COUNT_SECONDS = 1.0


class Models(Protocol):
    """The models that a server has. Every method may be called from any thread."""

    def find(self, name: str | None) -> str:
        """The served name that a row means. Raises ApiError where it means none."""
        ...

    def open_worker(self, name: str) -> Worker:
        """Waits until the model is loaded. Raises HeadraceError where it cannot be."""
        ...

    def hold(self, name: str) -> AbstractContextManager[None]:
        """For `with`: the model is not freed, whether or not it has requests."""
        ...


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """How rows are read. `defaults` fill what rows do not say; with `share_prefixes` owners share cached prefixes."""

    defaults: Callable[[LLM], SamplingParams]
    unknown: Unknown = "error"
    share_prefixes: bool = False


class Closing(Exception):
    """The server is closing: the batch goes on when it starts again."""


class Cancelled(Exception):
    """Its owner wants the batch to end."""


class BatchFailed(HeadraceError):
    """The batch as a whole cannot go on. `code` is a stable word for machines."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BatchRun:
    """A batch's turn. Any thread may set `cancel` and call `claim`; the rest belongs to the one that calls `run`.

    `batch` is as this thread knew it last; `rate` is in rows a second.
    """

    def __init__(
        self, store: Store, models: Models, settings: BatchSettings, batch: Batch, closing: threading.Event
    ) -> None:
        self.store = store
        self.models = models
        self.settings = settings
        self.batch = batch
        self.closing = closing
        self.cancel = threading.Event()
        self.rate = 0.0
        self._claimed = threading.Lock()

    def claim(self) -> bool:
        """Whether the calling thread is the first that wants to run the batch."""
        return self._claimed.acquire(blocking=False)

    def run(self) -> None:
        """Bring the batch to its end. Raises Closing, and what the disk refuses; then it may be called again."""
        self.batch = self.store.find_batch(None, self.batch.id)
        try:
            if self.batch.status == "validating":
                self._validate()
            if self.batch.status == "in_progress":
                self._end(self._answer())
        except Cancelled:
            self.batch = self.store.find_batch(None, self.batch.id)
        except BatchFailed as error:
            self.fail(error.code, str(error))
        if self.batch.unfinished:
            self.batch = conclude(self.store, self.batch)

    def fail(self, code: str, message: str) -> None:
        """End the batch as failed, with what it has answered."""
        self._end("failed", (BatchError(code, message),))

    def _end(self, ending: Ending, errors: tuple[BatchError, ...] = ()) -> None:
        """Ask no more of the engine: what is left is to write what there is."""
        self._change(lambda batch: batch.become("finalizing", now(), ending=ending, errors=errors))

    def _change(self, change: Callable[[Batch], Batch]) -> None:
        """Take a step of the batch's life, unless its owner has cancelled it meanwhile, or it is over."""

        def step(batch: Batch) -> Batch:
            return change(batch) if batch.unfinished and batch.status != "cancelling" else batch

        self.batch = self.store.change_batch(self.batch.id, step)

    def _pause(self) -> None:
        """Let other threads work. Raises Closing or Cancelled where one is asked for."""
        time.sleep(PAUSE_SECONDS)
        self._look_up()

    def _look_up(self) -> None:
        """Raises Closing or Cancelled where one is asked for."""
        if self.closing.is_set():
            raise Closing
        if self.cancel.is_set():
            raise Cancelled

    # Before the first row.

    def _validate(self) -> None:
        path = self.store.path_of(self.batch.input_file_id)
        found = check_lines(path, self.batch.endpoint, self.models.find, self._pause)
        if not found.errors:
            with self.models.hold(str(found.model)):
                _, llm = self._open_model(str(found.model))
                check_bodies(path, self._make_drafter(llm), found, self._pause)
        self._change(lambda batch: judge(batch, found))

    def _open_model(self, name: str) -> tuple[Worker, LLM]:
        """Raises BatchFailed, and Closing where it cannot be loaded because the server ends."""
        try:
            worker = self.models.open_worker(name)
            return worker, worker.ready.result()
        except HeadraceError as error:
            self._look_up()
            raise BatchFailed("model_unavailable", str(error)) from None

    def _make_drafter(self, llm: LLM) -> BatchDrafter:
        return BatchDrafter(llm.tokenizer, self.settings.defaults(llm), self.settings.unknown, llm.options.model)

    # Rows.

    def _answer(self) -> Ending:
        """Answer the rows that the journal has not, as far as there is time. Raises Closing, Cancelled, BatchFailed."""
        model = str(self.batch.model)
        with self.models.hold(model):
            worker, llm = self._open_model(model)
            journal = Journal(self.store.journal_of(self.batch.id))
            try:
                check_settings(journal, describe_settings(llm, self.settings.defaults(llm), self.settings.unknown))
                return self._feed(worker, llm, journal)
            except WorkerGone:
                raise Closing from None
            finally:
                journal.close()

    def _feed(self, worker: Worker, llm: LLM, journal: Journal) -> Ending:
        """Rows in and answers out, until all are there or the time is over."""
        owner = "" if self.settings.share_prefixes else self.batch.owner
        inlet = WorkerInlet(worker, self.batch.id, owner)
        rows = JsonLines(self.store.path_of(self.batch.input_file_id)).rows()
        feed = Feed(rows, self._make_drafter(llm), inlet, llm.tokenizer, journal)
        saver = Saver(journal, self._count)
        try:
            while not feed.complete:
                self._look_up()
                if now() >= self.batch.expires_at:
                    return "expired"
                if feed.wants_rows():
                    saver.add(feed.top_up(READ_ROWS))
                    self._pause()
                else:
                    inlet.release()
                    saver.add(feed.collect(inlet.take(SAVE_SECONDS)))
            return "completed"
        finally:
            # Whatever ends it, what the engine has said is kept, and nothing of this batch stays there.
            saver.add(feed.collect(inlet.withdraw()))
            saver.save()

    def _count(self, completed: int, failed: int, rate: float) -> None:
        """Show clients how far the batch is."""
        self.rate = rate
        self.batch = self.store.change_batch(
            self.batch.id, lambda batch: msgspec.structs.replace(batch, completed=completed, failed=failed)
        )


class Saver:
    """Saves finished rows now and then, and says now and then how many there are and how many a second."""

    def __init__(self, journal: Journal, tell: Callable[[int, int, float], None]) -> None:
        totals = journal.totals()
        self.journal = journal
        self.rows, self.failed = totals.rows, totals.failed
        self._tell = tell
        self._waiting: list[Finished] = []
        self._first = self.rows
        self._began = self._saved = self._told = time.monotonic()
        tell(self.rows - self.failed, self.failed, 0.0)

    def add(self, finished: list[Finished]) -> None:
        self._waiting += finished
        if len(self._waiting) >= SAVE_ROWS or time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Bring all to the disk."""
        self._saved = time.monotonic()
        if not self._waiting:
            return
        self.journal.save(self._waiting)
        self.rows += len(self._waiting)
        self.failed += sum(each.record.answer.error is not None for each in self._waiting)
        self._waiting.clear()
        if self._saved - self._told >= COUNT_SECONDS:
            self._told = self._saved
            rate = (self.rows - self._first) / (self._saved - self._began)
            self._tell(self.rows - self.failed, self.failed, rate)


def judge(batch: Batch, found: Findings) -> Batch:
    """What validation makes of a batch."""
    if found.errors:
        return batch.become("failed", now(), errors=tuple(found.errors), model=found.model)
    return batch.become("in_progress", now(), model=found.model, total=found.rows)


def check_settings(journal: Journal, settings: dict[str, Any]) -> None:
    """Raises BatchFailed where the journal's rows were answered with other settings."""
    known = journal.read_meta("fingerprint")
    if known is None:
        journal.write_meta("fingerprint", settings)
    elif differences := compare(known, settings):
        message = f"the server was started anew with other settings while the batch ran: {'; '.join(differences)}. "
        raise BatchFailed("settings_changed", message + "Send the rows of the error file again as a new batch")


def describe_settings(llm: LLM, defaults: SamplingParams, unknown: Unknown) -> dict[str, Any]:
    """Every setting that can change a row's answer, as `headrace run` keeps them."""
    tokenizer = llm.tokenizer
    vocabulary = f"{tokenizer.backend.to_str()}\0{tokenizer.chat_template}\0{sorted(tokenizer.eos_token_ids)}"
    named = ("precision", "weights", "kernels", "instruction_set", "device", "seed", "max_context")
    facts = {
        "model": llm.model_hash,
        "tokenizer": digest(vocabulary),
        **{name: llm.resolved[name] or None for name in named},
        "kv": None if llm.options.kv == FULL else llm.options.kv,
        "block_size": None if llm.options.kv == FULL else llm.options.block_size,
        "defaults": digest(defaults),
        "unknown_fields": unknown,
        **{f"version of {name}": number for name, number in list_versions().items() if name in COMPUTING},
        "version of headrace": __version__,
    }
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(facts))
    return plain
