"""Read a pile of rows as a stream: JSONL, CSV, Parquet. Knows nothing of prompts, models or outputs.

A line that is no row becomes a Row with an error; the rows after it are read on. Every source may be read many times.
CSV cells are text, always: what the first rows look like must not decide how a later one is read.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.core import InputError, RowError

MAX_LINE_BYTES = 64 * 2**20
BATCH_ROWS = 256
BOM = b"\xef\xbb\xbf"
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
BATCH_FIELDS = ("custom_id", "url", "body")
PEEKED_ROWS = 100
# What Arrow raises for a cell that is no Python value, or cannot be cast.
UNREADABLE = (OverflowError, ValueError, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its place from 0, its line in the file from 1 (for Parquet its number), and its fields or its error."""

    index: int
    line: int
    value: dict[str, Any] | None
    error: RowError | None = None


class Source(Protocol):
    """A file of rows. `columns` are its columns in order where the file itself names them, else None."""

    path: Path
    columns: tuple[str, ...] | None

    def rows(self) -> Iterator[Row]: ...

    def count(self) -> int: ...


class JsonLines:
    """One JSON object a line. Blank lines are skipped; a byte order mark is accepted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: tuple[str, ...] | None = None

    def rows(self) -> Iterator[Row]:
        decoder = msgspec.json.Decoder()
        with self.path.open("rb") as file:
            for index, (line, text) in enumerate(read_lines(file)):
                yield read_object(decoder, index, line, text)

    def count(self) -> int:
        with self.path.open("rb") as file:
            return sum(1 for _ in read_lines(file))


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of each line that is not blank; None instead of the bytes of an endless one."""
    line = 0
    while text := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        if line == 1:
            text = text.removeprefix(BOM)
        if len(text) > MAX_LINE_BYTES and not text.endswith(b"\n"):
            while text and not text.endswith(b"\n"):
                text = file.readline(MAX_LINE_BYTES)
            yield line, None
        elif not text.isspace() and text:
            yield line, text


def read_object(decoder: msgspec.json.Decoder[Any], index: int, line: int, text: bytes | None) -> Row:
    if text is None:
        return Row(index, line, None, RowError("line_too_long", f"the line has more than {MAX_LINE_BYTES} bytes"))
    try:
        value = decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        return Row(index, line, None, RowError("invalid_json", f"not JSON: {explain(error)}"))
    if not isinstance(value, dict):
        return Row(index, line, None, RowError("not_an_object", f"a row must be a JSON object, got {name_type(value)}"))
    return Row(index, line, value)


def explain(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "its text is not UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if "truncated" in str(error):
        return "the line ends too early, or a \\u escape is half of a pair"
    return str(error).removeprefix("JSON is malformed: ")


def name_type(value: object) -> str:
    """The JSON name of a value's type."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


class CsvTable:
    """Comma-separated values in UTF-8, the first line naming the columns; quoted cells may hold line ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        csv.field_size_limit(MAX_LINE_BYTES)
        header = next((cells for _, cells, _ in self._cells()), None)
        if not header:
            raise InputError(f"{path} is empty: a CSV file begins with a line of column names")
        check_columns(path, header)
        self.columns: tuple[str, ...] | None = tuple(header)

    def rows(self) -> Iterator[Row]:
        cells = self._cells()
        names = self.columns or ()
        next(cells)
        for index, (line, values, error) in enumerate(cells):
            if values is not None and len(values) != len(names):
                message = f"the row has {len(values)} cells; the header names {len(names)} columns"
                error = RowError("csv_cells", message)
            if error is not None or values is None:
                yield Row(index, line, None, error)
            else:
                yield Row(index, line, dict(zip(names, values, strict=True)))

    def count(self) -> int:
        return sum(1 for _ in self._cells()) - 1

    def _cells(self) -> Iterator[tuple[int, list[str] | None, RowError | None]]:
        """Line, cells and error of each record that is not blank. The line is the one where the record begins."""
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            while True:
                line = reader.line_num + 1
                try:
                    values = next(reader)
                except StopIteration:
                    return
                except csv.Error as cause:
                    yield line, None, RowError("invalid_csv", f"not CSV: {cause}")
                    continue
                if not values:
                    continue
                error = None
                if not all(map(is_unicode, values)):
                    error = RowError("invalid_csv", "not CSV: a cell is not UTF-8")
                yield line, values, error


def is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class ParquetTable:
    """A Parquet file, read in bounded batches."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
            self.schema: pa.Schema = self._file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is not a Parquet file: {first_line(error)}") from None
        check_columns(path, self.schema.names)
        self.columns: tuple[str, ...] | None = tuple(self.schema.names)

    def batches(self) -> Iterator[pa.RecordBatch]:
        try:
            yield from self._file.iter_batches(batch_size=BATCH_ROWS)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.path} is damaged: {first_line(error)}") from None

    def rows(self) -> Iterator[Row]:
        index = 0
        for batch in self.batches():
            for cells in zip(*map(read_column, batch.schema.names, batch.columns), strict=True):
                error = next((cell for cell in cells if isinstance(cell, RowError)), None)
                value = dict(zip(batch.schema.names, cells, strict=True)) if error is None else None
                yield Row(index, index + 1, value, error)
                index += 1

    def count(self) -> int:
        return int(self._file.metadata.num_rows)


def read_column(name: str, column: pa.Array) -> list[Any]:
    """Its cells as Python values; nanoseconds are cut, which Python's own times do not have."""
    try:
        return list(column.cast(cut_times(column.type), safe=False).to_pylist())
    except UNREADABLE:
        return [read_cell(name, cell) for cell in column]


def cut_times(kind: pa.DataType) -> pa.DataType:
    """The type with microseconds for its nanoseconds, however deep they lie."""
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return pa.time64("us")
    if pa.types.is_struct(kind):
        return pa.struct([each.with_type(cut_times(each.type)) for each in kind])
    if pa.types.is_map(kind):
        return pa.map_(cut_times(kind.key_type), cut_times(kind.item_type), kind.keys_sorted)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        items = cut_times(kind.value_type)
        return kind if items == kind.value_type else pa.list_(items)
    return kind


def read_cell(name: str, cell: pa.Scalar) -> Any:
    """A cell that Python may have no value for, as a date after the year 9999: as text, else as its row's error."""
    try:
        return cell.cast(cut_times(cell.type), safe=False).as_py()
    except UNREADABLE as error:
        with suppress(*UNREADABLE):
            return cell.cast(pa.string()).as_py()
        return RowError("parquet_cell", f"column {name!r} holds what cannot be read: {first_line(error)}")


def check_columns(path: Path, names: list[str]) -> None:
    """Raise InputError unless every column has a name of its own."""
    seen: set[str] = set()
    for place, name in enumerate(names, 1):
        if not name:
            raise InputError(f"{path}: column {place} has no name; name every column in the header")
        if name in seen:
            raise InputError(f"{path}: two columns are named {name!r}; rename one")
        if not is_unicode(name):
            raise InputError(f"{path}: the name of column {place} is not UTF-8")
        seen.add(name)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def open_source(path: Path, kind: str) -> JsonLines | CsvTable | ParquetTable:
    """The rows of a file of a kind of KINDS. Raises InputError for one that is not of its kind."""
    if kind == "jsonl":
        return JsonLines(path)
    return CsvTable(path) if kind == "csv" else ParquetTable(path)


def find_kind(path: Path) -> str:
    """A file's kind by its suffix; InputError for one that Headrace does not read."""
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path}: cannot tell the kind of file by its name; it must end in {', '.join(KINDS)}")
    return kind


def sniff_kind(path: Path) -> str:
    """The kind of what came from standard input, by its first bytes: Parquet's mark, a brace for JSONL, else CSV."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(BOM).lstrip()
    if head.startswith(b"PAR1"):
        return "parquet"
    return "jsonl" if head[:1] in (b"{", b"[", b"") else "csv"


def looks_like_batch(source: Source) -> bool:
    """Whether a JSONL file is an OpenAI Batch file: one of its first objects has two of a batch row's own fields."""
    for row in source.rows():
        if row.index >= PEEKED_ROWS:
            return False
        if row.value is not None and sum(name in row.value for name in BATCH_FIELDS) >= 2:
            return True
    return False


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
