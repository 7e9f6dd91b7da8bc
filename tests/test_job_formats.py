"""What a job writes for each kind of input and output, through the real engine and a tiny model."""

from __future__ import annotations

import base64
import csv
import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs import answer_of, batch_row, batch_rows, engine_options, read_lines, run, write_lines

from headrace import LLM
from headrace.core import InputError, ModelError
from headrace.job.columns import convert, infer_schema, read_cells, read_json_type, result_columns
from headrace.job.records import Answer, Choice, Record, Traits
from headrace.job.sources import JsonLines

RESULTS = ["output", "finish_reason", "prompt_tokens", "output_tokens", "error"]


def test_openai_batch_lines_have_openais_shape(tiny_model: Path, tmp_path: Path) -> None:
    completion = {"prompt": "The wheel", "max_tokens": 3, "n": 2, "logprobs": 2, "echo": False, "model": "other"}
    rows = [
        batch_row("a", "Hi", logprobs=True, top_logprobs=2, max_tokens=3),
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": completion},
        batch_row("c", "Hi", audio={"voice": "deep"}),
        {"custom_id": "d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Say ", "echo": True}},
    ]
    report = run(tiny_model, write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    chat, completed, echoed = read_lines(tmp_path / "out.jsonl")
    (error,) = read_lines(tmp_path / "out.errors.jsonl")
    assert list(chat) == ["id", "custom_id", "response", "error"] and chat["error"] is None
    assert chat["id"].startswith("batch_req_") and chat["response"]["status_code"] == 200
    body = chat["response"]["body"]
    assert list(body) == ["id", "object", "created", "model", "choices", "usage", "system_fingerprint"]
    assert (body["object"], body["model"]) == ("chat.completion", tiny_model.name)
    (choice,) = body["choices"]
    assert list(choice) == ["index", "message", "logprobs", "finish_reason"]
    assert list(choice["message"]) == ["role", "content", "refusal"]
    token = choice["logprobs"]["content"][0]
    assert list(token) == ["token", "logprob", "bytes", "top_logprobs"] and len(token["top_logprobs"]) == 2
    assert token["logprob"] == token["top_logprobs"][0]["logprob"]
    usage = body["usage"]
    assert (
        usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] and usage["completion_tokens"] <= 3
    )
    body = completed["response"]["body"]
    assert (body["object"], body["model"]) == ("text_completion", "other")
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    logprobs = body["choices"][0]["logprobs"]
    assert (
        list(logprobs) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
        and logprobs["text_offset"][0] == 0
    )
    assert echoed["response"]["body"]["choices"][0]["text"].startswith("Say ")
    assert error["custom_id"] == "c" and error["response"] is None
    assert error["error"]["code"] == "unknown_field" and error["error"]["line"] == 3
    assert (report["requests"], report["succeeded"], report["failed"]) == (4, 3, 1)
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text()) == report


def test_no_error_file_without_errors_and_none_stays(tiny_model: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, [*batch_rows(2), batch_row("x", "y", wrong=1)])
    run(tiny_model, source, output)
    assert (tmp_path / "out.errors.jsonl").exists()
    write_lines(source, batch_rows(2))
    run(tiny_model, source, output, fresh=True)
    assert not (tmp_path / "out.errors.jsonl").exists() and len(read_lines(output)) == 2


TABLE = [{"id": 1, "text": "one", "output": True}, {"id": 2, "text": 'a "quoted"\nline, é', "output": None}]


def write_table(path: Path) -> Path:
    if path.suffix == ".csv":
        path.write_text('id,text,output\n1,one,true\n2,"a ""quoted""\nline, é",\n')
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(TABLE), path)
    else:
        write_lines(path, TABLE)
    return path


def read_table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    return pq.read_table(path).to_pylist() if path.suffix == ".parquet" else read_lines(path)


def embedding_row(name: str, value: Any, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/embeddings", "body": {"input": value} | body}


def test_rows_may_ask_for_vectors(tiny_model: Path, tmp_path: Path) -> None:
    texts = ["The wheel turns.", "Water falls on the wheel.", "The wheel turns."]
    rows = [embedding_row(f"row {index}", text) for index, text in enumerate(texts)]
    rows += [
        embedding_row("text", texts[0], encoding_format="base64", model="other"),
        embedding_row("short", texts[0], dimensions=4),
        embedding_row("tokens", [5, 6, 7]),
        batch_row("chat", "Hi"),
        embedding_row("several", texts),
        embedding_row("long", "word " * 2000),
        embedding_row("wide", "a", dimensions=100_000),
        embedding_row("empty", ""),
        embedding_row("model", "a", model=5),
        embedding_row("huge", [2**63]),
    ]
    report = run(tiny_model, write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    found = {line["custom_id"]: line["response"]["body"] for line in read_lines(tmp_path / "out.jsonl")}
    with LLM(**vars(engine_options(tiny_model))) as llm:
        expected = [np.array(each, np.float32) for each in llm.embed(texts)]
    body = found["row 0"]
    assert list(body) == ["object", "data", "model", "usage", "system_fingerprint"] and body["object"] == "list"
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0
    for index, vector in enumerate(expected):
        (entry,) = found[f"row {index}"]["data"]
        assert (entry["object"], entry["index"]) == ("embedding", 0) and entry["embedding"] == vector.tolist()
    assert found["text"]["model"] == "other"
    assert base64.b64decode(found["text"]["data"][0]["embedding"]) == expected[0].tobytes()
    short = np.array(found["short"]["data"][0]["embedding"], np.float32)
    assert len(short) == 4 and np.allclose(short, expected[0][:4] / np.linalg.norm(expected[0][:4]))
    assert found["tokens"]["usage"]["prompt_tokens"] == 3 and found["chat"]["object"] == "chat.completion"
    errors = {line["custom_id"]: line["error"] for line in read_lines(tmp_path / "out.errors.jsonl")}
    assert {name: error["code"] for name, error in errors.items()} == {
        "several": "invalid_value", "long": "context_length", "wide": "invalid_value", "empty": "invalid_value",
        "model": "invalid_value", "huge": "invalid_value",
    }  # fmt: skip
    assert "give each a row of its own" in errors["several"]["message"]
    assert report["rows_shared"] == 3, "equal texts are computed once, however their vectors are wanted"


def test_a_tables_rows_become_vectors(tiny_model: Path, tmp_path: Path) -> None:
    source = write_table(tmp_path / "in.csv")
    run(tiny_model, source, tmp_path / "out.parquet", prompt="{{ text }}", embed=True)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32())
    assert table.column_names == ["id", "text", "output", "embedding", "prompt_tokens", "error"], (
        "output is the input's"
    )
    with LLM(**vars(engine_options(tiny_model))) as llm:
        assert np.allclose(table["embedding"].to_pylist(), llm.embed([row["text"] for row in TABLE]), atol=1e-7)
    (tiny_model / "1_Pooling").mkdir()
    (tiny_model / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    try:
        with pytest.raises(ModelError, match="pooling_mode_cls_token is not supported"):
            run(tiny_model, source, tmp_path / "cls.csv", prompt="{{ text }}", embed=True)
    finally:
        shutil.rmtree(tiny_model / "1_Pooling")
    run(tiny_model, source, tmp_path / "cls.csv", prompt="{{ text }}")
    for own, message in (({}, "embed needs a prompt template"), ({"prompt": "a", "regex": "b"}, "leave out")):
        with pytest.raises(InputError, match=message):
            run(tiny_model, source, tmp_path / "other.csv", embed=True, **own)


@pytest.mark.parametrize("wanted", ["out.csv", "out.parquet"])
def test_vectors_are_a_column_of_tables(wanted: str, tiny_model: Path, tmp_path: Path) -> None:
    rows = [embedding_row("a", "The wheel"), batch_row("b", "Hi")]
    run(tiny_model, write_lines(tmp_path / "in.jsonl", rows), tmp_path / wanted)
    first, second = read_table(tmp_path / wanted)
    vector = json.loads(first["embedding"]) if wanted.endswith("csv") else first["embedding"]
    assert np.isclose(np.linalg.norm(vector), 1) and not first["output"] and not first["finish_reason"]
    assert not second["embedding"] and second["output"]


@pytest.mark.parametrize("wanted", ["out.jsonl", "out.csv", "out.parquet"])
@pytest.mark.parametrize("given", ["in.jsonl", "in.csv", "in.parquet"])
def test_tables_keep_their_columns_in_every_format(given: str, wanted: str, tiny_model: Path, tmp_path: Path) -> None:
    source = write_table(tmp_path / given)
    run(tiny_model, source, tmp_path / wanted, prompt="{{ text }}")
    rows = read_table(tmp_path / wanted)
    # The input has a column of our name: it stays as it is, and ours gets a prefix.
    assert list(rows[0]) == ["id", "text", "output", "headrace_output", *RESULTS[1:]]
    kept = [{name: row[name] for name in ("id", "text", "output")} for row in rows]
    texts = [{"id": "1", "text": "one", "output": "true"}, {"id": "2", "text": TABLE[1]["text"], "output": ""}]
    assert kept == (texts if "csv" in given + wanted else TABLE)
    assert all(row["headrace_output"] and row["finish_reason"] == "length" for row in rows)
    assert [int(row["output_tokens"]) for row in rows] == [4, 4]
    assert all(not row["error"] for row in rows)


def test_rows_that_fail_say_why_in_their_row(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,text\n1,good\n2\n3," + "long " * 2000 + "\n1,again\n")
    run(tiny_model, tmp_path / "in.csv", tmp_path / "out.csv", prompt="{{ text }}", id_column="id")
    errors = [row["error"] for row in read_table(tmp_path / "out.csv")]
    assert errors[0] == "" and errors[1] == "line 3: csv_cells: the row has 1 cells; the header names 2 columns"
    assert errors[2].startswith("line 4: context_length: the prompt has ")
    assert errors[3] == "line 5: duplicate_id: id '1' is that of row 1 already"


def test_parquet_columns_pass_through_untouched(tiny_model: Path, tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", "b"]).dictionary_encode(),
            "when": pa.array([1, None], pa.timestamp("ns")),
            "tree": [{"x": [1, 2]}, None],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    run(tiny_model, tmp_path / "in.parquet", tmp_path / "out.parquet", prompt="{{ text }}")
    written = pq.read_table(tmp_path / "out.parquet")
    assert written.select(table.column_names).equals(table)
    assert written.schema.field("prompt_tokens").type == pa.int64()
    run(tiny_model, tmp_path / "in.parquet", tmp_path / "out.csv", prompt="{{ text }}")
    rows = read_table(tmp_path / "out.csv")
    assert [rows[0]["tree"], rows[1]["tree"]] == ['{"x":[1,2]}', ""]
    assert rows[0]["when"] == str(datetime(1970, 1, 1))


@pytest.mark.parametrize("wanted", ["out.csv", "out.parquet"])
def test_a_cell_that_python_cannot_hold_costs_no_other_row(wanted: str, tiny_model: Path, tmp_path: Path) -> None:
    late = 253_402_300_800 * 10**6  # the year 10000
    table = pa.table(
        {
            "when": pa.array([late, 0, 0, None], pa.timestamp("us")),
            "times": pa.array([[1001], None, [1], []], pa.list_(pa.timestamp("ns"))),
            "deep": pa.array([[0], [0], [late], None], pa.list_(pa.timestamp("us"))),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    run(tiny_model, tmp_path / "in.parquet", tmp_path / wanted, prompt="{{ when }} {{ times }} {{ deep }}")
    written = tmp_path / wanted
    if wanted == "out.csv":
        rows = read_table(written)
        assert rows[0]["when"].startswith("10000-01-01 00:00:00")
    else:
        assert pq.read_table(written, columns=table.column_names).equals(table)
        rows = pq.read_table(written, columns=["output", "error"]).to_pylist()
    assert [bool(row["output"]) for row in rows] == [True, True, False, True]
    assert rows[2]["error"].startswith("line 3: parquet_cell: column 'deep' holds what cannot be read: date")


@pytest.mark.parametrize("wanted", ["out.csv", "out.parquet"])
def test_a_batch_file_may_become_a_table(wanted: str, tiny_model: Path, tmp_path: Path) -> None:
    rows = [batch_row("a", "Hi"), batch_row("b", "Ho", n=2, logprobs=True), batch_row("c", "Hu", audio={})]
    run(tiny_model, write_lines(tmp_path / "in.jsonl", rows), tmp_path / wanted, unknown_fields="warn")
    first, second, third = read_table(tmp_path / wanted)
    assert list(first) == ["custom_id", *RESULTS, "logprobs", "warnings"]
    assert first["custom_id"] == "a" and not first["logprobs"] and not first["warnings"]
    assert len(json.loads(second["output"])) == 2 and len(json.loads(second["logprobs"])) == 2
    assert json.loads(third["warnings"]) == ["body.audio: not supported, ignored"]


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "good": {"type": "boolean"},
        "kind": {"enum": ["a", "b"]},
        "count": {"enum": [1, 2]},
        "none": {"type": ["integer", "null"], "minimum": 3, "maximum": 3},
        "tags": {"type": "array", "items": {"const": "t"}, "minItems": 1, "maxItems": 1},
    },
    "required": ["good", "kind", "count", "none", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        ("[" * 2000 + "]" * 2000, "object"),
        ('"\\ud800"', "string"),
        ('["\\ud800"]', "array"),
        ("1" + "0" * 400, "number"),
    ],
)
def test_an_answer_that_a_column_cannot_hold_leaves_it_empty(size: str, kind: str) -> None:
    answer = f'{{"size": {size}}}'
    record = Record("", 1, Answer(choices=[Choice(answer, "stop", 1)]))
    columns = result_columns([], Traits(0), {"properties": {"size": {"type": kind}}})
    cells = read_cells(record, columns)
    assert cells[0] == answer and cells[-1] is None


def test_a_schemas_properties_become_typed_columns(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    write_lines(tmp_path / "in.jsonl", [{"text": "x", "kind": "own"}, {"text": "y", "kind": "own"}])
    settings = {"prompt": "{{ text }}", "json_schema": str(tmp_path / "schema.json"), "expand": True}
    run(tiny_model, tmp_path / "in.jsonl", tmp_path / "out.parquet", {"max_tokens": 100}, **settings)
    table = pq.read_table(tmp_path / "out.parquet")
    types = {name: str(table.schema.field(name).type) for name in table.column_names[-5:]}
    assert types == {"good": "bool", "headrace_kind": "string", "count": "int64", "none": "int64", "tags": "string"}
    for row in table.to_pylist():
        said = json.loads(row["output"])
        assert row["finish_reason"] == "stop" and row["kind"] == "own"
        assert (row["good"], row["headrace_kind"], row["count"]) == (said["good"], said["kind"], said["count"])
        assert json.loads(row["tags"]) == said["tags"] == ["t"]
    run(tiny_model, tmp_path / "in.jsonl", tmp_path / "short.parquet", {"max_tokens": 3}, **settings)
    assert all(row["good"] is None and row["output"] for row in pq.read_table(tmp_path / "short.parquet").to_pylist())


@pytest.mark.parametrize(
    ("definition", "kind"),
    [
        ({"type": "string"}, "string"), ({"type": ["null", "number"]}, "number"),
        ({"type": ["string", "number"]}, None), ({"type": "object"}, None), ({"anyOf": []}, None),
        (True, None), ({"enum": ["a", None]}, "string"),
        ({"enum": ["a", 1]}, None), ({"const": True}, "boolean"), ({"const": 1.5}, "number"),
    ],
)  # fmt: skip
def test_types_of_properties(definition: Any, kind: str | None) -> None:
    assert read_json_type(definition) == kind


@pytest.mark.parametrize(
    ("value", "kind", "cell"),
    [
        (1, "integer", 1), (1.0, "integer", 1), (1.5, "integer", None), (2**63, "integer", None),
        (True, "integer", None), (1, "number", 1.0), ("1", "number", None), (1, "boolean", None),
        (False, "boolean", False), (5, "string", None),
        ({"a": [1]}, None, '{"a":[1]}'), ("a", None, '"a"'), (None, "string", None),
    ],
)  # fmt: skip
def test_values_of_properties(value: Any, kind: str | None, cell: Any) -> None:
    found = convert(value, kind)
    assert found == cell and type(found) is type(cell)


def test_result_columns_never_take_a_name_that_is_there() -> None:
    taken = ["output", "headrace_output", "error"]
    names = [column.name for column in result_columns(taken, Traits.WARNINGS, {"properties": {"error": {}, "new": {}}})]
    expected = [
        "headrace_headrace_output",
        "finish_reason",
        "prompt_tokens",
        "output_tokens",
        "headrace_error",
        "warnings",
    ]
    assert names == [*expected, "headrace_headrace_error", "new"]


def test_choices_bound_every_output(tiny_model: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [{"text": f"number {index}"} for index in range(6)])
    settings = {"prompt": "{{ text }}", "choice": "good, bad"}
    run(tiny_model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", {"max_tokens": 9, "temperature": 1.5}, **settings)
    assert {row["output"] for row in read_lines(tmp_path / "out.jsonl")} <= {"good", "bad"}


def test_the_output_says_the_same_whatever_the_format(tiny_model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", batch_rows(5))
    run(tiny_model, source, tmp_path / "out.jsonl")
    run(tiny_model, source, tmp_path / "out.csv")
    lines = [answer_of(line) for line in read_lines(tmp_path / "out.jsonl")]
    assert lines == [row["output"] for row in read_table(tmp_path / "out.csv")]


@pytest.mark.parametrize(
    ("name", "text", "settings", "message"),
    [
        ("in.txt", "a", {}, "cannot tell the kind of file by its name; it must end in .jsonl"),
        ("in.jsonl", "", {}, "is empty: there is no row to answer"),
        ("in.csv", "a,b\n", {"prompt": "{{ a }}"}, "holds no rows"),
        ("in.csv", "a,b\n1,2\n", {}, "is a table: say what to ask with --prompt"),
        ("in.jsonl", '{"a": 1}\n', {}, "is a table: say what to ask with --prompt"),
        ("in.csv", "a,b\n1,2\n", {"prompt": "{{ c }}"}, "'c' is undefined; the row has a, b"),
        ("in.csv", "a,b\n1,2\n", {"prompt": "{{ a }}", "id_column": "key"}, "has no column 'key'; it has a, b"),
        ("in.csv", "a,b\n1,2\n", {"prompt": "{{ a "}, "the prompt template is wrong in line 1"),
        ("in.csv", "a,b\n1,2\n", {"prompt": "a", "prompt_file": "b"}, "either --prompt or --prompt-file"),
        ("in.csv", "a,b\n1,2\n", {"prompt_file": "none.txt"}, "none.txt: cannot read the prompt template"),
        ("in.jsonl", json.dumps(batch_row("a", "b")), {"system": "x"}, "--system is for tables"),
        ("in.jsonl", json.dumps(batch_row("a", "b")), {"id_column": "x"}, "--id-column is for tables"),
        ("in.jsonl", json.dumps(batch_row("a", "b")), {"chat": False}, "--no-chat is for tables"),
        ("in.csv", "a,b\n1,2\n", {"prompt": "a", "max_errors": "x"}, "max_errors must be a number of rows"),
        ("in.csv", "a,b\n1,2\n", {"prompt": "a", "max_errors": "0"}, "max_errors must be a number of rows"),
        ("in.parquet", "no", {"prompt": "a"}, "is not a Parquet file"),
    ],
)
def test_inputs_that_cannot_begin(
    name: str, text: str, settings: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        run(tiny_model, tmp_path / name, tmp_path / "out.jsonl", **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    # Nothing is left behind that would make a corrected second try look like another job.
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_outputs_that_cannot_be(tiny_model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", batch_rows(1))
    (tmp_path / "mine.jsonl").write_text("mine")
    cases = {
        "out.xml": "the output must end in .jsonl",
        "none/out.jsonl": "none does not exist: make the folder",
        "in.jsonl": "is both input and output",
        "mine.jsonl": "mine.jsonl exists and has no journal",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            run(tiny_model, source, tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        run(tiny_model, tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="is a folder"):
        run(tiny_model, tmp_path, tmp_path / "out.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


def test_a_job_never_writes_over_its_input(tiny_model: Path, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "q.errors.jsonl", batch_rows(1)), tmp_path / "q.jsonl"
    before = source.read_bytes()
    for written in ("q.jsonl.report.json", "q.jsonl.journal", "q.jsonl.input"):
        (tmp_path / written).hardlink_to(source)
        with pytest.raises(InputError, match=f"both input and output .the job writes .*{written}"):
            run(tiny_model, source, output, prompt="{{ custom_id }}", fresh=True)
        (tmp_path / written).unlink()
    with pytest.raises(InputError, match="both input and output"):
        run(tiny_model, source, output, fresh=True)
    with pytest.raises(InputError, match="both input and output"):
        run(tiny_model, source, tmp_path / "out.jsonl", trace=str(source))
    assert source.read_bytes() == before and list(tmp_path.iterdir()) == [source]
    # A table has no error file.
    run(tiny_model, source, output, prompt="{{ custom_id }}")
    assert source.read_bytes() == before


def test_every_row_of_a_jsonl_table_counts_for_its_columns(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "in.jsonl", [{"a": 1}, {"a": 1.5, "b": [1]}, {"c": "x", "b": None}, {"c": 1, "d": True}]
    )
    schema = infer_schema(JsonLines(path))
    assert {field.name: str(field.type) for field in schema} == {
        "a": "double",
        "b": "string",
        "c": "string",
        "d": "bool",
    }
