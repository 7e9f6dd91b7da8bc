"""Write the final files from the journal, in the input's order, all of a file or nothing of it.

Equal journals give equal bytes. A file is written under another name, brought to the disk and then renamed.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import IO, Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.core import InputError
from headrace.job.bodies import make_line
from headrace.job.columns import Column, fit, infer_schema, read_cells, result_columns, to_text
from headrace.job.journal import Journal
from headrace.job.records import Record
from headrace.job.sources import BATCH_ROWS, ParquetTable, Row, Source

OUTPUT_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
BATCH_COLUMNS = pa.schema([("custom_id", pa.string())])


@dataclass(frozen=True, slots=True)
class ResultFormat:
    """What to write. `batch`: the input is an OpenAI Batch file; `schema` is what --expand makes columns of."""

    output: Path
    batch: bool
    model: str
    fingerprint: str
    schema: dict[str, Any] | None = None
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        kind = OUTPUT_KINDS.get(self.output.suffix.lower())
        if kind is None:
            raise InputError(f"{self.output}: the output must end in {', '.join(OUTPUT_KINDS)}")
        object.__setattr__(self, "kind", kind)

    @property
    def errors(self) -> Path:
        """The file of the failed rows of an OpenAI Batch job."""
        return self.output.with_name(f"{self.output.stem}.errors.jsonl")

    def list_files(self, failures: int) -> list[Path]:
        """The files of a job of which so many rows have failed."""
        return [self.output, self.errors] if self.batch and self.kind == "jsonl" and failures else [self.output]


def write_results(source: Source, journal: Journal, form: ResultFormat) -> list[Path]:
    """Write OUTPUT, and the error file where the job has one; a stale one is removed. Returns what was written."""
    if form.batch and form.kind == "jsonl":
        return write_batch(journal, form)
    writers: dict[str, Callable[[Source, Journal, ResultFormat], None]] = {
        "jsonl": write_json_table,
        "csv": write_csv,
        "parquet": write_parquet,
    }
    writers[form.kind](source, journal, form)
    return [form.output]


def write_batch(journal: Journal, form: ResultFormat) -> list[Path]:
    encoder, failures = msgspec.json.Encoder(), 0
    with replace_file(form.errors, "wb") as errors, replace_file(form.output, "wb") as output:
        for _, record in journal.records():
            failed = record.answer.error is not None
            failures += failed
            line = encoder.encode(make_line(record, form.model, form.fingerprint))
            (errors if failed else output).write(line + b"\n")
    if not failures:
        form.errors.unlink()
    return form.list_files(failures)


def merge(source: Source, journal: Journal, form: ResultFormat) -> Iterator[tuple[Row, Record]]:
    """Each row of the input with its record. Of an OpenAI Batch row only its id is a column."""
    for row, entry in zip_longest(source.rows(), journal.records()):
        if row is None or entry is None:
            raise InputError(f"{source.path} changed while the job ran: it has not as many rows as before")
        record = entry[1]
        yield (Row(row.index, row.line, {"custom_id": record.id}) if form.batch else row), record


def write_json_table(source: Source, journal: Journal, form: ResultFormat) -> None:
    """Rows keep their own fields, and a result column has one name in all of them."""
    taken = BATCH_COLUMNS.names if form.batch else source.columns or infer_schema(source).names
    columns = result_columns(taken, journal.traits(), form.schema)
    encoder = msgspec.json.Encoder()
    with replace_file(form.output, "wb") as file:
        for row, record in merge(source, journal, form):
            cells = read_cells(record, columns)
            line = (row.value or {}) | {column.name: cell for column, cell in zip(columns, cells, strict=True)}
            file.write(encoder.encode(line) + b"\n")


def write_csv(source: Source, journal: Journal, form: ResultFormat) -> None:
    names = BATCH_COLUMNS.names if form.batch else list(source.columns or infer_schema(source).names)
    columns = result_columns(names, journal.traits(), form.schema)
    with replace_file(form.output, "w") as file:
        writer = csv.writer(file)  # lines end as RFC 4180 has it: with "\n" Python 3.11 leaves a lone "\r" unquoted
        writer.writerow([*names, *(column.name for column in columns)])
        for row, record in merge(source, journal, form):
            value = row.value or {}
            cells = [to_text(value.get(name)) for name in names]
            writer.writerow(cells + [to_text(cell) for cell in read_cells(record, columns)])


def write_parquet(source: Source, journal: Journal, form: ResultFormat) -> None:
    inputs = input_schema(source, form)
    columns = result_columns(inputs.names, journal.traits(), form.schema)
    schema = pa.schema([*inputs, *(pa.field(column.name, column.type) for column in columns)], inputs.metadata)
    if isinstance(source, ParquetTable):
        parts = merge_batches(source, journal)
    else:
        parts = build_batches(merge(source, journal, form), inputs)
    with replace_file(form.output, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for arrays, records in parts:
            writer.write_batch(pa.RecordBatch.from_arrays(arrays + build_arrays(records, columns), schema=schema))


def input_schema(source: Source, form: ResultFormat) -> pa.Schema:
    if form.batch:
        return BATCH_COLUMNS
    if isinstance(source, ParquetTable):
        return source.schema
    return pa.schema([(name, pa.string()) for name in source.columns]) if source.columns else infer_schema(source)


def merge_batches(source: ParquetTable, journal: Journal) -> Iterator[tuple[list[pa.Array], list[Record]]]:
    """The input's own Arrow columns, as they are, with their records."""
    records = journal.records()
    for batch in source.batches():
        yield list(batch.columns), [record for _, record in islice(records, batch.num_rows)]


def build_batches(
    pairs: Iterator[tuple[Row, Record]], inputs: pa.Schema
) -> Iterator[tuple[list[pa.Array], list[Record]]]:
    """Arrow columns made from rows, with their records."""
    while part := list(islice(pairs, BATCH_ROWS)):
        values = [row.value or {} for row, _ in part]
        arrays = [pa.array([fit(value.get(each.name), each.type) for value in values], each.type) for each in inputs]
        yield arrays, [record for _, record in part]


def build_arrays(records: list[Record], columns: list[Column]) -> list[pa.Array]:
    rows = [read_cells(record, columns) for record in records]
    return [pa.array([row[place] for row in rows], column.type) for place, column in enumerate(columns)]


@contextmanager
def replace_file(path: Path, mode: str) -> Iterator[IO[Any]]:
    """A new file that takes the place of `path`, on the disk, when the block ends well; else nothing changes."""
    part = path.with_name(f"{path.name}.part")
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        with part.open(mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        flush_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def flush_folder(folder: Path) -> None:
    """Bring a rename to the disk: the name is kept in the folder, not in the file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
