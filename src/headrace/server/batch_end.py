"""The end of a batch: rows without an answer are given their error, results become files, the status its last value.

Needs no model. Killed at any instant and called again, it gives the same files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from headrace.core import RowError
from headrace.job.feed import guess_id
from headrace.job.intake import name_system
from headrace.job.journal import Finished, Journal, Totals, remove_journal
from headrace.job.records import Record, failed
from headrace.job.records import now as current
from headrace.job.results import ResultFormat, write_results
from headrace.job.sources import BATCH_ROWS, JsonLines, Row
from headrace.server.batch_object import Batch, Ending, FileObject
from headrace.server.store import Store, now

EXPIRED = RowError("batch_expired", "This request could not be executed before the completion window expired.")
CANCELLED = RowError("batch_cancelled", "This request could not be executed before the batch was cancelled.")


def conclude(store: Store, batch: Batch) -> Batch:
    """Write the results of a batch that is finalizing or cancelling; what it is then."""
    ending: Ending = "cancelled" if batch.status == "cancelling" else batch.ending
    if "in_progress_at" not in batch.times:
        return store.change_batch(batch.id, lambda batch: batch.become(ending, now()))
    journal = Journal(store.journal_of(batch.id))
    try:
        source = JsonLines(store.path_of(batch.input_file_id))
        settle(source, journal, explain(batch, ending))
        totals = journal.totals()
        outputs = write_outputs(store, batch, source, journal)
    finally:
        journal.close()
    batch = store.change_batch(batch.id, lambda batch: count(batch.become(ending, now()), totals), outputs)
    remove_journal(store.journal_of(batch.id))
    return batch


def explain(batch: Batch, ending: Ending) -> RowError:
    """The error of a row that was never answered."""
    if ending == "failed" and batch.errors:
        return RowError(batch.errors[0].code, batch.errors[0].message)
    return {"expired": EXPIRED, "cancelled": CANCELLED}.get(
        ending, RowError("server_error", "the row was not answered")
    )


def settle(source: JsonLines, journal: Journal, error: RowError) -> None:
    """Give every row that has no answer this error."""
    for rows in parts(source.rows()):
        done = journal.finished_between(rows[0].index, rows[-1].index)
        left = [row for row in rows if row.index not in done]
        if left:
            journal.save(Finished(row.index, Record(guess_id(row), row.line, failed(error), current())) for row in left)


def parts(rows: Iterator[Row]) -> Iterator[list[Row]]:
    part: list[Row] = []
    for row in rows:
        part.append(row)
        if len(part) == BATCH_ROWS:
            yield part
            part = []
    if part:
        yield part


def write_outputs(
    store: Store, batch: Batch, source: JsonLines, journal: Journal
) -> dict[str, tuple[FileObject, Path]]:
    """The contents of the output and the error file, where they have any, by the field that names them."""
    place = store.journal_of(batch.id).with_suffix(".jsonl")
    fingerprint = name_system(journal.read_meta("fingerprint") or {})
    form = ResultFormat(place, batch=True, model=str(batch.model), fingerprint=fingerprint)
    written = write_results(source, journal, form)
    kinds = {"output_file_id": form.output, "error_file_id": form.errors}
    return {
        field: (describe_output(batch, field.removesuffix("_file_id"), path), path)
        for field, path in kinds.items()
        if path in written and path.stat().st_size
    }


def describe_output(batch: Batch, kind: str, path: Path) -> FileObject:
    """Its id is made from the batch's, so that writing it again replaces it."""
    created = now()
    return FileObject(
        id=f"file-{batch.id.removeprefix('batch_')}-{kind}",
        owner=batch.owner,
        bytes=path.stat().st_size,
        created_at=created,
        filename=f"{batch.id}_{kind}.jsonl",
        purpose="batch_output",
        expires_at=None if batch.keep_seconds is None else created + batch.keep_seconds,
    )


def count(batch: Batch, totals: Totals) -> Batch:
    """The batch with the counts of all its rows."""
    return msgspec.structs.replace(
        batch,
        completed=totals.rows - totals.failed,
        failed=totals.failed,
        input_tokens=totals.prompt_tokens,
        output_tokens=totals.output_tokens,
    )
