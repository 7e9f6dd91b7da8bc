"""Watches what a job's KV cache loses while it runs, and has the full cache take over when that is too much.

Every 200th row is answered by the full cache, too, and compared as on the sample. Knows no policy by name.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

from headrace.cache.policies.choice import FULL
from headrace.core import Request, RowError
from headrace.engine.outputs import RequestOutput
from headrace.job.feed import Feed
from headrace.job.inlet import EngineInlet
from headrace.job.journal import Journal
from headrace.job.kv_budget import KVChoice, keep_kv_choice
from headrace.job.loss import LossMeter, answer_fully
from headrace.job.progress import Progress
from headrace.job.sample import LEAST_ROWS
from headrace.llm import LLM
from headrace.meter.report import format_loss, format_share

CHECK_EVERY = 200


class Guard:
    """Steps a job's engine. Falls back in three turns: rows that wait are taken out, those that run end under the old
    cache, then the full cache takes its place and the rows come back."""

    def __init__(
        self, llm: LLM, feed: Feed, inlet: EngineInlet, choice: KVChoice, journal: Journal, progress: Progress
    ) -> None:
        self.llm = llm
        self.feed = feed
        self.inlet = inlet
        self.choice = choice
        self.journal = journal
        self.progress = progress
        self._held: list[Request] = []
        self._compared = False

    def step(self) -> list[RequestOutput]:
        """One step of the engine, and a check of the rows that it finished and that are to be checked."""
        engine = self.llm.engine
        refused: list[RequestOutput] = []
        if self._compared:
            # The rows are in the journal by now: after a crash none is compared, and counted, again.
            keep_kv_choice(self.journal, self.choice)
            self._compared = False
        if self.inlet.paused and not engine.unfinished:
            refused = self._go_on()
        outputs = engine.step()
        if self.choice.in_use != FULL:
            self._check(outputs)
        return refused + outputs

    def _check(self, outputs: Rows[RequestOutput]) -> None:
        for output in outputs:
            request, rows = self.feed.find(output.request_id)
            if output.error is None and request.generates and any(is_checked(row) for row in rows):
                self._compare(request)
        if self._loses_too_much():
            self._give_up({output.request_id for output in outputs})

    def _compare(self, request: Request) -> None:
        choice = self.choice
        with self.llm.engine.meter.watch.whole("measuring loss"):
            for answered in answer_fully(self.llm, [request]):
                meter = LossMeter(self.llm, choice.kv, len(request.prompt_token_ids) + len(answered.tokens))
                meter.compare(answered, choice.checks)
                self._compared = True

    def _loses_too_much(self) -> bool:
        """Past the budget by more than one standard error, on enough rows to be believed."""
        checks = self.choice.checks
        return checks.rows >= LEAST_ROWS and checks.share - checks.error > self.choice.budget

    def _give_up(self, finished: set[str]) -> None:
        """finished: requests that are not in the engine any more."""
        choice, engine = self.choice, self.llm.engine
        choice.fell_back = choice.checks.rows
        keep_kv_choice(self.journal, choice)
        self.progress.say(
            f"kv {choice.kv} loses {format_loss(choice.checks.describe(), 'checked rows')}, and "
            f"{format_share(choice.budget)} is allowed: rows that have not begun are computed with the full cache"
        )
        self.inlet.paused = True
        waiting = [each for each in self.feed.requests if each.id not in finished and not engine.has_begun(each.id)]
        engine.abort_all([request.id for request in waiting])
        self._held.extend(waiting)

    def _go_on(self) -> list[RequestOutput]:
        """The engine is empty: change its cache, give back what was taken out; answers of rows that do not fit it."""
        self.llm.use_kv(self.choice.in_use, self.llm.options.block_size)
        self.inlet.reopen()
        refused = []
        for request in self._held:
            try:
                self.inlet.add(request)
            except RowError as error:
                tokens = list(request.prompt_token_ids)
                refused.append(RequestOutput(request.id, None, tokens, [], error=error))
        self._held = []
        return refused


def is_checked(row: int) -> bool:
    """Whether a row, from 0, is one of those that are checked."""
    return row % CHECK_EVERY == CHECK_EVERY - 1
