"""Which KV cache a job uses where the user has said what it may lose: the smallest that keeps within it on a sample.

How small a cache is depends on how long rows are: the newest tokens stay exact beside what is rounded, so for short
rows a lossy cache takes more than the full one. What counts is the blocks that rows like the sample's would take.
The choice is kept in the journal, so that a job goes on with the cache that it began with. Knows no policy by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headrace.cache.layout import CacheLayout
from headrace.cache.policies.choice import CANDIDATES, FULL, make_policy
from headrace.core import InputError, Request
from headrace.job.intake import Job
from headrace.job.journal import Journal
from headrace.job.loss import ANSWER_TOKENS, Answered, Loss, LossMeter, answer_fully
from headrace.job.progress import Progress
from headrace.job.sample import LEAST_ROWS, draw_sample
from headrace.llm import LLM
from headrace.meter.report import format_loss, format_share

# The name in the journal.
KEPT = "kv_loss"
# A candidate is given up before its last row where the loss is past the budget by so many standard errors.
HOPELESS_ROWS, HOPELESS_ERRORS = 4, 2.0


@dataclass(slots=True)
class Trial:
    """A candidate, and its loss on the sample; rows may be fewer, where it was plain soon that it loses too much.

    bytes_per_token, row_bytes  of one more token of a long text; of a row like the sampled ones, the mean
    """

    kv: str
    bytes_per_token: int
    row_bytes: int = 0
    loss: Loss = field(default_factory=Loss)


@dataclass(slots=True)
class KVChoice:
    """What a job keeps its keys and values in, and why.

    budget     the share by which the perplexity of the full cache's answers may rise
    full_bytes_per_token, full_row_bytes  of the full cache, as of a trial
    seconds    what the choice took
    trials     what was tried, smallest first; the last one is `kv` unless that is the full cache
    checks     the loss over finished rows that were checked
    fell_back  after how many checked rows the full cache took over; None while it has not
    """

    budget: float
    kv: str = FULL
    sampled_rows: int = 0
    full_bytes_per_token: int = 0
    full_row_bytes: int = 0
    seconds: float = 0.0
    trials: list[Trial] = field(default_factory=list)
    checks: Loss = field(default_factory=Loss)
    fell_back: int | None = None

    @property
    def in_use(self) -> str:
        return self.kv if self.fell_back is None else FULL

    def describe(self) -> dict[str, Any]:
        """As the report has it."""
        taken = next((trial for trial in self.trials if trial.kv == self.kv), None)
        return {
            "budget": self.budget,
            "kv": self.kv,
            "sample": None if taken is None else taken.loss.describe(),
            "sampled_rows": self.sampled_rows,
            "measure_s": round(self.seconds, 3),
            "full_bytes_per_token": self.full_bytes_per_token,
            "full_row_bytes": self.full_row_bytes,
            "candidates": [
                {
                    "kv": trial.kv,
                    "bytes_per_token": trial.bytes_per_token,
                    "row_bytes": trial.row_bytes,
                    **trial.loss.describe(),
                }
                for trial in self.trials
            ],
            "checked": self.checks.describe(),
            "fell_back": self.fell_back is not None,
            "fell_back_after_checks": self.fell_back,
        }


def read_kv_choice(journal: Journal) -> KVChoice | None:
    kept = journal.read_meta(KEPT)
    return None if kept is None else msgspec.convert(kept, KVChoice)


def keep_kv_choice(journal: Journal, choice: KVChoice) -> None:
    journal.write_meta(KEPT, choice)


def settle_kv(job: Job, llm: LLM, progress: Progress, check_stop: Callable[[], None]) -> KVChoice | None:
    """Have the engine use the cache that an earlier run of the job settled on, or else choose one. None: no budget."""
    budget = job.ask.kv_loss
    if budget is None:
        return None
    block_size = job.ask.engine.block_size
    # What `headrace tune` prefers does not count here: what a smaller cache loses depends on the size of its blocks.
    llm.use_kv(FULL, block_size)
    choice = read_kv_choice(job.journal)
    if choice is None:
        began = time.monotonic()
        drafter = job.ask.make_drafter(job.batch, llm.tokenizer)
        requests = draw_sample(job.source, job.rows, drafter, llm.tokenizer, llm.context_length) if budget else []
        with llm.engine.meter.watch.whole("measuring loss"):
            choice = choose_kv(llm, requests, budget, progress, check_stop)
        choice.seconds = time.monotonic() - began
        keep_kv_choice(job.journal, choice)
    elif choice.fell_back is not None:
        progress.say(f"kv {FULL}, as {choice.kv} was given up before")
    else:
        progress.say(f"kv {choice.kv}, as chosen before")
    llm.use_kv(choice.in_use, block_size)
    return choice


def choose_kv(
    llm: LLM, requests: Rows[Request], budget: float, progress: Progress, check_stop: Callable[[], None]
) -> KVChoice:
    """Try the candidates on a sample, the smallest first, until one keeps within the budget.

    It does where the loss and one standard error are within it: a small sample must not be lucky.
    """
    full = arrange(llm, FULL)
    choice = KVChoice(budget, full_bytes_per_token=round(full.bytes_per_token))
    if budget == 0:
        progress.say(f"kv {FULL}: only the full cache is sure to lose nothing")
        return choice
    prompts = sum(len(each.prompt_token_ids) for each in requests)
    progress.say(
        f"measuring on {len(requests)} rows of {prompts:,} prompt tokens what smaller KV caches lose; "
        f"{format_share(budget)} is allowed"
    )
    progress.show("the full cache answers the sampled rows")
    answered = answer_fully(llm, requests)
    choice.sampled_rows = len(answered)
    if len(answered) < LEAST_ROWS:
        progress.say(f"kv {FULL}: {len(answered)} rows could be measured, and it takes {LEAST_ROWS} to tell a loss")
        return choice
    rows = list_rows(answered)
    choice.full_row_bytes = count_row_bytes(full, rows)
    for trial in list_trials(llm, rows, choice.full_row_bytes, progress):
        choice.trials.append(trial)
        try_candidate(llm, trial, answered, budget, progress, check_stop)
        found = f"kv {trial.kv} loses {format_loss(trial.loss.describe(), 'sampled rows')}"
        if trial.loss.share + trial.loss.error <= budget:
            choice.kv = trial.kv
            size = f"{trial.row_bytes:,} bytes a row instead of {choice.full_row_bytes:,}"
            progress.say(f"{found}: taken, {size}")
            break
        progress.say(f"{found}: too much")
    else:
        lacking = f"smaller cache is known to keep within {format_share(budget)}"
        progress.say(f"kv {FULL}: no {lacking if choice.trials else 'other cache takes less for rows like these'}")
    return choice


def list_rows(answered: Rows[Answered]) -> list[tuple[int, int]]:
    """Prompt and output tokens of the rows that were answered, of each continuation: of an answer that was cut, as many
    as it may have."""
    rows = []
    for each in answered:
        params, output = each.request.params, len(each.tokens)
        output = output if output < ANSWER_TOKENS else params.max_tokens
        rows += [(len(each.request.prompt_token_ids), output)] * params.n
    return rows


def list_trials(llm: LLM, rows: Rows[tuple[int, int]], full_bytes: int, progress: Progress) -> list[Trial]:
    """The candidates that can serve the model and take less for these rows than the full cache, the smallest first."""
    trials = []
    for kv in CANDIDATES:
        try:
            layout = arrange(llm, kv)
            trials.append(Trial(kv, round(layout.bytes_per_token), count_row_bytes(layout, rows)))
        except InputError as error:
            progress.say(f"kv {kv} cannot be used: {error}")
    fitting = [each for each in trials if each.row_bytes < full_bytes]
    return sorted(fitting, key=lambda each: (each.row_bytes, each.bytes_per_token))


def arrange(llm: LLM, kv: str) -> CacheLayout:
    """Raises InputError for a policy that cannot serve the model."""
    return make_policy(kv).arrange(llm.engine.model.kv_shape, llm.options.block_size)


def count_row_bytes(layout: CacheLayout, rows: Rows[tuple[int, int]]) -> int:
    """Bytes of the blocks that a row of so many prompt and output tokens needs to be let in, the mean."""
    blocks = sum(layout.blocks_for(prompt + output, prompt=prompt) for prompt, output in rows)
    return blocks * layout.block_bytes // len(rows)


def try_candidate(
    llm: LLM,
    trial: Trial,
    answered: Rows[Answered],
    budget: float,
    progress: Progress,
    check_stop: Callable[[], None],
) -> None:
    """Measure a candidate's loss on the sample, or on as much of it as it takes to see that it is too large."""
    meter = LossMeter(llm, trial.kv, max(len(each.request.prompt_token_ids) + len(each.tokens) for each in answered))
    for row, each in enumerate(answered, 1):
        check_stop()
        progress.show(f"kv {trial.kv}: row {row} of {len(answered)} of the sample")
        meter.compare(each, trial.loss)
        loss = trial.loss
        if loss.rows >= HOPELESS_ROWS and loss.share - HOPELESS_ERRORS * loss.error > budget:
            return
