"""A whole job: read the pile, answer each row once, write the results and the report.

The order is what makes it safe: flags, lock, input and journal are checked before the model is loaded; a row counts as
finished when the journal has it on the disk; files are written when every row is there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.core import InputError
from headrace.job.feed import Feed
from headrace.job.foresight import foresee
from headrace.job.guard import Guard
from headrace.job.inlet import EngineInlet
from headrace.job.intake import STDIN, Job, open_job, read_ask
from headrace.job.journal import Finished
from headrace.job.kv_budget import read_kv_choice, settle_kv
from headrace.job.progress import Progress, State
from headrace.job.records import Traits
from headrace.job.results import write_results
from headrace.job.sources import hash_file
from headrace.job.stop import INTERRUPTED, TOO_MANY_ERRORS, JobStopped, StopSignals, explain_disk_errors, lock_output
from headrace.llm import LLM
from headrace.meter.counters import Counters
from headrace.meter.meter import Meter
from headrace.meter.report import describe_run, write_report
from headrace.options import EngineOptions, RunOptions, SamplingOptions


@dataclass(slots=True)
class Work:
    """What this run did."""

    counters: Counters
    meter: Meter | None
    settings: dict[str, Any]
    load_seconds: float = 0.0
    run_seconds: float = 0.0
    rows: int = 0
    failed: int = 0
    shared: int = 0
    windows: int = 0
    forecast: dict[str, Any] | None = None


def run_job(
    source: str, output: str, engine: EngineOptions, sampling: SamplingOptions, run: RunOptions
) -> dict[str, Any]:
    """Answer every row of `source` (a path, or - for standard input) into `output`; the report.

    A job that was stopped goes on where it was; one that is complete is not run again. Rows that fail are error rows
    and do not fail the job. Raises InputError or ModelError for what is wrong as a whole, JobStopped for a job that
    ended early with its finished rows saved.
    """
    ask = read_ask(source, output, engine, sampling, run)
    with explain_disk_errors(ask.output), lock_output(ask.output), StopSignals() as stop:
        job = open_job(ask)
        try:
            return complete(job, stop)
        finally:
            job.journal.close()


def complete(job: Job, stop: StopSignals) -> dict[str, Any]:
    totals = job.journal.totals()
    state = State(job.rows, totals.rows, totals.failed, totals.rows)
    progress = Progress(state, job.ask.run.quiet, job.ask.run.json)
    report: dict[str, Any] | None = None
    if totals.rows == job.rows:
        report = job.journal.read_meta("report")
        if report is not None and are_written(job):
            progress.say(f"all {job.rows:,} rows are answered already in {job.ask.output}")
            report |= {"written": [str(path) for path in job.form.list_files(totals.failed)]}
            drop_spool(job)
            progress.show_report(report)
            return report
        work = Work(Counters(), None, job.ask.settings())
    else:
        if totals.rows:
            progress.say(f"{totals.rows:,} of {job.rows:,} rows are done already; going on with the rest")
        with progress:
            work = answer_rows(job, progress, stop)
    return conclude(job, work, progress, report)


def answer_rows(job: Job, progress: Progress, stop: StopSignals) -> Work:
    """Load the model and answer the rows that are not in the journal. Raises JobStopped."""
    check_stop(job, progress, stop)
    progress.say(f"loading {job.ask.engine.model}")
    with LLM(**asdict(job.ask.engine)) as llm:
        if job.ask.engine.precision == "auto":
            progress.say(f"precision {llm.resolved['precision']}: {llm.resolved['precision_reason']}")
        progress.restart_clock()
        choice = settle_kv(job, llm, progress, lambda: check_stop(job, progress, stop))
        engine = llm.engine
        work = Work(engine.counters, engine.meter, job.ask.settings() | llm.resolved, llm.load_seconds)
        if job.ask.run.trace is not None:
            engine.meter.write_trace(Path(job.ask.run.trace), progress.say)
        names = {llm.model_name, job.ask.engine.model, None}
        inlet, drafter = EngineInlet(engine), job.ask.make_drafter(job.batch, llm.tokenizer)
        feed = Feed(job.source.rows(), drafter, inlet, llm.tokenizer, job.journal)
        step = engine.step if choice is None else Guard(llm, feed, inlet, choice, job.journal, progress).step
        progress.state.flow = feed.flow
        while not feed.complete:
            check_stop(job, progress, stop)
            if feed.wants_rows():
                finished = feed.top_up()
            else:
                if work.forecast is None:
                    rows = job.rows - progress.state.rows_before
                    progress.show("planning")
                    work.forecast = foresee(llm, feed, rows, progress.seconds)
                    progress.show_forecast(work.forecast)
                    progress.start_computing()
                finished = feed.collect(step())
            if finished:
                with engine.meter.watch.part("files"):
                    job.journal.save(finished)
                count(finished, work, progress.state)
                for each in finished:
                    tell(each, names, llm.model_name, progress)
            progress.update(engine.counters, engine.meter)
        progress.update(engine.counters, engine.meter, last=True)
        work.run_seconds, work.shared = progress.seconds, feed.flow.shared
        # The last window is not full.
        work.windows = inlet.window.filled + inlet.window.filling
        # The full KV cache may have taken over.
        work.settings |= llm.resolved
    return work


def check_stop(job: Job, progress: Progress, stop: StopSignals) -> None:
    if stop.requested:
        saved = describe_saved(job, progress.state)
        raise JobStopped(f"interrupted: {saved}; run the same command again to go on", INTERRUPTED)
    check_errors(job, progress.state)


def check_errors(job: Job, state: State) -> None:
    limit = job.most_errors
    if limit is not None and state.errors >= limit:
        message = f"{state.errors:,} rows failed, which --max-errors {job.ask.run.max_errors} does not allow"
        first = next((record for _, record in job.journal.records() if record.answer.error is not None), None)
        if first is not None and first.answer.error is not None:
            message += f"; the first is line {first.line}: {first.answer.error.message}"
        raise JobStopped(f"{message}. {describe_saved(job, state)}", TOO_MANY_ERRORS)


def describe_saved(job: Job, state: State) -> str:
    return f"{state.rows_done:,} of {job.rows:,} rows are saved in {job.journal.path}"


def count(finished: list[Finished], work: Work, state: State) -> None:
    failures = sum(each.record.answer.error is not None for each in finished)
    work.rows += len(finished)
    work.failed += failures
    state.rows_done += len(finished)
    state.errors += failures


def tell(finished: Finished, names: set[str | None], answering: str, progress: Progress) -> None:
    """Say once what a user should know of a row that was answered: another model, fields left out."""
    record = finished.record
    if record.model not in names:
        progress.say_of_rows(f"rows ask for the model {record.model!r}; {answering} answers them")
    for warning in record.warnings:
        progress.say_of_rows(warning)


def are_written(job: Job) -> bool:
    """Whether the final files are those that this job wrote last, with the same columns."""
    return bool(job.journal.read_meta("written") == describe_files(job, [Path(job.form.output), job.form.errors]))


def describe_files(job: Job, paths: list[Path]) -> dict[str, Any]:
    found = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.exists()}
    return {"files": found, "expand": job.ask.run.expand}


def conclude(job: Job, work: Work, progress: Progress, report: dict[str, Any] | None) -> dict[str, Any]:
    """Write results and report (that of an earlier run, where it had answered the last row). Raises JobStopped where
    the last rows brought too many errors, or an earlier run had them."""
    check_errors(job, progress.state)
    if job.journal.totals().rows != job.rows or hash_file(job.source.path) != job.input_hash:
        raise InputError(f"{job.source.path} changed while the job ran: start anew with --fresh")
    written = write_results(job.source, job.journal, job.form)
    report = (report or make_report(job, work)) | {"written": [str(path) for path in written]}
    job.journal.write_meta("report", report)
    job.journal.write_meta("written", describe_files(job, [job.form.output, job.form.errors]))
    write_report(Path(f"{job.ask.output}.report.json"), report)
    drop_spool(job)
    progress.show_report(report)
    return report


def drop_spool(job: Job) -> None:
    """Standard input is not needed any more once the results are written."""
    if job.ask.source == STDIN:
        job.source.path.unlink(missing_ok=True)


def make_report(job: Job, work: Work) -> dict[str, Any]:
    """Rows and tokens of this run at the top; of the whole job, over all its runs, under `job`."""
    totals, choice = job.journal.totals(), read_kv_choice(job.journal)
    return {
        "requests": work.rows,
        "succeeded": work.rows - work.failed,
        "failed": work.failed,
        **describe_run(work.counters, work.meter, work.load_seconds, work.run_seconds, work.settings, job.model_hash),
        "forecast": compare_forecast(work),
        "kv_loss": None if choice is None else choice.describe(),
        "windows": work.windows,
        "rows_total": job.rows,
        "rows_resumed": totals.rows - work.rows,
        "rows_shared": work.shared,
        "rows_shortened": job.journal.count_trait(Traits.SHORTENED),
        "job": {
            "rows": totals.rows,
            "succeeded": totals.rows - totals.failed,
            "failed": totals.failed,
            "prompt_tokens": totals.prompt_tokens,
            "output_tokens": totals.output_tokens,
        },
    }


def compare_forecast(work: Work) -> dict[str, Any] | None:
    """The forecast, with `missed`, the share by which the run took longer, where it said how long."""
    found = work.forecast
    if found is None or not found["seconds"]:
        return found
    return found | {"missed": round(work.run_seconds / found["seconds"] - 1, 4)}
