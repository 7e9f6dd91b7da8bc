"""The columns of a table of results: which there are, what types they have, and a record's cells.

Order: the input's columns, then the results', then a schema's properties. A name that is already taken gets
`headrace_` before it, so an input column never changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

import msgspec
import pyarrow as pa

from headrace.job.bodies import describe_logprobs
from headrace.job.records import Record, Traits
from headrace.job.sources import Source

PREFIX = "headrace_"
TYPES = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}
PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class Column:
    """A result column: where its value comes from (a key of `read_results`, or a property), its name and its type."""

    key: str
    name: str
    type: pa.DataType
    property: str | None = None
    json_type: str | None = None


def result_columns(taken: Iterable[str], traits: Traits, schema: Mapping[str, Any] | None) -> list[Column]:
    """The columns that results add to input columns named `taken`; those that only some jobs need come if needed."""
    names = set(taken)

    def choose(name: str) -> str:
        while name in names:
            name = PREFIX + name
        names.add(name)
        return name

    vectors = bool(Traits.EMBEDDINGS & traits)
    texts = bool(Traits.TEXTS & traits) or not vectors
    wanted = [("output", pa.string()), ("finish_reason", pa.string())] if texts else []
    wanted += [("embedding", pa.list_(pa.float32()))] if vectors else []
    wanted += [("prompt_tokens", pa.int64())]
    wanted += [("output_tokens", pa.int64())] if texts else []
    wanted += [("error", pa.string())]
    wanted += [("logprobs", pa.string())] if Traits.LOGPROBS & traits else []
    wanted += [("warnings", pa.string())] if Traits.WARNINGS & traits else []
    columns = [Column(key, choose(key), kind) for key, kind in wanted]
    for name, definition in (schema or {}).get("properties", {}).items():
        kind = read_json_type(definition)
        columns.append(Column("", choose(name), TYPES.get(kind or "", pa.string()), name, kind))
    return columns


def read_json_type(definition: Any) -> str | None:
    """A property's one simple type, null left aside; None where it has several or a nested one (then JSON text)."""
    kinds = definition.get("type") if isinstance(definition, dict) else None
    if isinstance(definition, dict) and kinds is None:
        kinds = infer_enum_types(definition.get("enum", [definition["const"]] if "const" in definition else []))
    listed = [kinds] if isinstance(kinds, str) else list(kinds or [])
    simple = [kind for kind in listed if kind != "null"]
    return simple[0] if len(simple) == 1 and simple[0] in TYPES else None


def infer_enum_types(values: Any) -> list[str]:
    names = {str: "string", bool: "boolean", int: "integer", float: "number"}
    return sorted({names.get(type(value), "other") for value in values if value is not None})


def read_cells(record: Record, columns: Sequence[Column]) -> list[Any]:
    """A record's value for each result column, None where there is none."""
    answer = record.answer
    texts = [choice.text for choice in answer.choices]
    values: dict[str, Any] = {"prompt_tokens": answer.prompt_tokens, "output_tokens": answer.output_tokens}
    if answer.error is not None:
        values["error"] = f"line {record.line}: {answer.error.code}: {answer.error.message}"
    elif record.vector is not None:
        values["embedding"] = record.vector.tolist()
    elif len(texts) == 1:
        values |= {"output": record.prefix + texts[0], "finish_reason": answer.choices[0].finish_reason}
    else:
        values["output"] = to_json([record.prefix + text for text in texts])
        values["finish_reason"] = to_json([choice.finish_reason for choice in answer.choices])
    values["logprobs"] = describe_logprobs(answer.choices)
    values["warnings"] = to_json(record.warnings) if record.warnings else None
    found = read_object(texts[0]) if len(texts) == 1 and any(column.property for column in columns) else {}
    return [
        values.get(column.key) if column.property is None else convert(found.get(column.property), column.json_type)
        for column in columns
    ]


def read_object(text: str) -> dict[str, Any]:
    """The output as an object; empty for one that was cut off, or that is none which a file can hold."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def convert(value: Any, json_type: str | None) -> Any:
    """A property's value in its column's type; None where it does not fit, and the output column still has it."""
    if value is None:
        return None
    if json_type is None:
        return to_json(value)
    if isinstance(value, bool) is not (json_type == "boolean"):
        return None
    if json_type == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    fits = isinstance(value, PYTHON_TYPES[json_type]) and (json_type != "integer" or value in INT64)
    if not fits:
        return None
    try:
        return float(value) if json_type == "number" else value
    except OverflowError:
        return None


def to_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def to_text(value: Any) -> str:
    """A value as the cell of a CSV file."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float | Decimal | date) else to_json(value)


def infer_schema(source: Source) -> pa.Schema:
    """Names and types of a JSONL table's columns over all rows: text, whole number, number, boolean, else JSON text."""
    kinds: dict[str, set[str]] = {}
    for row in source.rows():
        for name, value in (row.value or {}).items():
            kinds.setdefault(name, set()).add(type_name(value))
    return pa.schema([(name, merge_types(found - {"null"})) for name, found in kinds.items()])


def type_name(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer" if value in INT64 else "other"
    return {str: "string", float: "number"}.get(type(value), "other")


def merge_types(found: set[str]) -> pa.DataType:
    if found == {"integer", "number"}:
        return pa.float64()
    return TYPES.get(next(iter(found)), pa.string()) if len(found) == 1 else pa.string()


def fit(value: Any, kind: pa.DataType) -> Any:
    """A JSONL value for a column of this type: JSON text where the column holds several types."""
    if value is None or (pa.types.is_string(kind) and isinstance(value, str)):
        return value
    if pa.types.is_string(kind):
        return to_json(value)
    return float(value) if pa.types.is_floating(kind) else value
