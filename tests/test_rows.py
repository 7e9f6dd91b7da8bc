"""Rows of every kind of input: what is read, and what is said of each malformed one. No model runs here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.checkpoint import Tokenizer, open_checkpoint
from headrace.core import Constraint, InputError, RowError, SamplingParams
from headrace.job import sources
from headrace.job.batch_rows import BatchDrafter
from headrace.job.drafts import Draft, encode_drafts, make_request, share_key
from headrace.job.openai import Unknown
from headrace.job.sources import CsvTable, JsonLines, ParquetTable, Row, looks_like_batch, sniff_kind
from headrace.job.table import TableDrafter, compile_template, fill_template, read_constraint
from headrace.job.tool_formats import HermesFormat
from headrace.options import RunOptions

CONTEXT = 1024
CHAT_BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return open_checkpoint(tiny_model).tokenizer()


def chat(**fields: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT_BODY | fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi"} | fields}


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


def read(tokenizer: Tokenizer, record: dict[str, Any], unknown: Unknown = "error") -> Draft:
    drafter = BatchDrafter(tokenizer, SamplingParams(max_tokens=16), unknown, "no model")
    row = Row(0, 1, record)
    return drafter.draft(row, drafter.name(row))


def content(value: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": value}])


BROKEN_LINES: list[tuple[bytes, str, str]] = [
    (b'{"custom_id": "a"', "invalid_json", "not JSON: the line ends too early, or a \\u escape is half of a pair"),
    (b'{"a": "\\ud800"}', "invalid_json", "not JSON: the line ends too early, or a \\u escape is half of a pair"),
    (b"{custom_id: 1}", "invalid_json", "not JSON: object keys must be strings (byte 1)"),
    (b'{"a": 1,}', "invalid_json", "not JSON: trailing comma in object (byte 8)"),
    (b'{"a": 1} {"b": 2}', "invalid_json", "not JSON: trailing characters (byte 10)"),
    (b'{"a": NaN}', "invalid_json", "not JSON: invalid character (byte 6)"),
    (b'{"a": "\xff"}', "invalid_json", "not JSON: its text is not UTF-8"),
    (b'{"a": ' + b"[" * 100_000, "invalid_json", "not JSON: it is nested too deeply"),
    (b"\x00\x01\x02", "invalid_json", "not JSON: invalid character (byte 0)"),
    (b"[1, 2]", "not_an_object", "a row must be a JSON object, got a list"),
    (b'"text"', "not_an_object", "a row must be a JSON object, got a string"),
    (b"null", "not_an_object", "a row must be a JSON object, got null"),
    (b"17", "not_an_object", "a row must be a JSON object, got a number"),
]

BAD_RECORDS: list[tuple[dict[str, Any], str, str]] = [
    (without(chat(), "custom_id"), "missing_field", "the row has no custom_id"),
    (chat() | {"custom_id": 7}, "invalid_value", "custom_id must be a text that is not empty"),
    (chat() | {"custom_id": ""}, "invalid_value", "custom_id must be a text that is not empty"),
    (without(chat(), "method"), "missing_field", "the row has no method"),
    (without(chat(), "url"), "missing_field", "the row has no url"),
    (without(chat(), "body"), "missing_field", "the row has no body"),
    (chat() | {"method": "GET"}, "invalid_value", "method must be POST, got 'GET'"),
    (
        chat() | {"url": "/v1/responses"},
        "unknown_url",
        "url must be one of /v1/chat/completions, /v1/completions, /v1/embeddings, got '/v1/resp",
    ),
    (chat() | {"body": "text"}, "invalid_value", "body must be an object"),
    (
        chat() | {"extra": 1},
        "unknown_field",
        "extra: not supported; take it out, or choose --unknown-fields warn or ignore",
    ),
    (chat(messages=None), "missing_field", "body.messages must be a list of at least one message"),
    (chat(messages=[]), "missing_field", "body.messages must be a list of at least one message"),
    (chat(messages=["Hi"]), "invalid_value", "body.messages[0] must be an object"),
    (chat(messages=[{"content": "Hi"}]), "missing_field", "body.messages[0] has no role"),
    (chat(messages=[{"role": "user"}]), "missing_field", "body.messages[0] has no content"),
    (content(5), "invalid_value", "body.messages[0].content must be a text or a list of text parts"),
    (
        content([{"type": "image_url", "image_url": {"url": "x"}}]),
        "unsupported_content",
        "body.messages[0].content[0] is not a text part; only text is read",
    ),
    (
        chat(messages=[{"role": "user", "content": "a", "mood": "b"}]),
        "unknown_field",
        "body.messages[0].mood: not supported",
    ),
    (chat(temperature="hot"), "invalid_value", 'body.temperature must be a number, got "hot"'),
    (chat(temperature=-1), "invalid_value", "body.temperature must be a number from 0 to 100, got -1"),
    (chat(top_p=0), "invalid_value", "body.top_p must be a number from"),
    (chat(n=0), "invalid_value", "body.n must be a whole number from 1 to 128, got 0"),
    (chat(n=1.5), "invalid_value", "body.n must be a whole number from 1 to 128, got 1.5"),
    (chat(max_tokens=0), "invalid_value", "body.max_tokens must be a whole number of at least 1, got 0"),
    (chat(max_tokens="9"), "invalid_value", 'body.max_tokens must be a whole number, got "9"'),
    (
        chat(max_tokens=5, max_completion_tokens=6),
        "invalid_value",
        "body.max_tokens and max_completion_tokens differ",
    ),
    (chat(seed="x"), "invalid_value", 'body.seed must be a whole number, got "x"'),
    (chat(stop=5), "invalid_value", "body.stop must be a text or a list of texts, got 5"),
    (chat(stop=[""]), "invalid_value", "body.stop must be at most 16 non-empty strings"),
    (chat(stop_token_ids=["a"]), "invalid_value", 'body.stop_token_ids must be a list of token ids, got ["a"]'),
    (chat(logit_bias={"x": 1}), "invalid_value", "body.logit_bias must map token ids to numbers, got 'x': 1"),
    (chat(logit_bias={"5": 500}), "invalid_value", "body.logit_bias[5] must be a number from -100 to 100, got 500"),
    (chat(ignore_eos=1), "invalid_value", "body.ignore_eos must be true or false, got 1"),
    (chat(logprobs=3), "invalid_value", "body.logprobs must be true or false, got 3"),
    (chat(top_logprobs=3), "invalid_value", "body.top_logprobs needs body.logprobs to be true"),
    (
        chat(logprobs=True, top_logprobs=50),
        "invalid_value",
        "body.top_logprobs must be a whole number from 0 to 20, got 50",
    ),
    (chat(tools=[{"type": "function"}]), "invalid_value", "body.tools[0].function must be an object"),
    (chat(stream=True), "unknown_field", "body.stream: not supported; take it out"),
    (chat(modalities=["audio"], audio={}), "unknown_field", "body.modalities, body.audio: not supported"),
    (chat(reasoning_effort="low"), "unknown_field", "body.reasoning_effort: not supported"),
    (chat(temprature=1), "unknown_field", "body.temprature: not supported"),
    (chat(best_of=4), "unknown_field", "body.best_of: not supported"),
    (
        chat(response_format={"type": "xml"}),
        "invalid_value",
        "body.response_format.type must be text, json_object or json_",
    ),
    (
        chat(response_format={"type": "json_schema"}),
        "missing_field",
        "body.response_format.json_schema.schema is missing",
    ),
    (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": "{"}}),
        "invalid_schema",
        "body.response_format.json_schema.schema is not JSON",
    ),
    (
        chat(structured_outputs={"choice": []}),
        "invalid_value",
        "body.structured_outputs.choice must be a list of texts",
    ),
    (chat(structured_outputs={"tree": 1}), "unknown_field", "body.structured_outputs.tree: not supported"),
    (chat(guided_json=[1]), "invalid_schema", "body.guided_json must be a JSON schema, an object"),
    (chat(guided_regex=5), "invalid_value", "body.guided_regex must be a text"),
    (
        chat(guided_regex="a", guided_choice=["b"]),
        "invalid_value",
        "the body asks for several output formats; give one",
    ),
    (
        chat(continue_final_message=True, add_generation_prompt=True),
        "invalid_value",
        "body.continue_final_message excludes",
    ),
    (completion(prompt=None), "missing_field", "body.prompt is missing"),
    (completion(prompt=""), "empty_prompt", "body.prompt is empty"),
    (completion(prompt=[]), "invalid_value", "body.prompt must be a text or a list of token ids"),
    (completion(prompt=["a", "b"]), "several_prompts", "body.prompt holds 2 prompts; give each a row of its own"),
    (completion(prompt=[[1], [2]]), "several_prompts", "body.prompt holds 2 prompts; give each a row of its own"),
    (completion(prompt=[1, "a"]), "invalid_value", "body.prompt must be a text or a list of token ids"),
    (completion(prompt=[1, -2]), "token_range", "body.prompt holds a token id that no model has"),
    (completion(prompt=[10**30]), "token_range", "body.prompt holds a token id that no model has"),
    (completion(logprobs=True), "invalid_value", "body.logprobs must be a whole number, got true"),
    (completion(echo=True, logprobs=1), "invalid_value", "body.echo together with logprobs is not supported"),
    (completion(suffix="end"), "unknown_field", "body.suffix: not supported"),
    (completion(model=5), "invalid_value", "body.model must be a text, got 5"),
]


@pytest.mark.parametrize(("line", "code", "message"), BROKEN_LINES)
def test_lines_that_are_no_rows(line: bytes, code: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    first, broken, last = JsonLines(path).rows()
    assert (first.value, last.value, last.index, last.line) == ({"a": 1}, {"a": 2}, 2, 4)
    assert broken.error is not None and (broken.index, broken.line) == (1, 3)
    assert (broken.error.code, str(broken.error)) == (code, message)


@pytest.mark.parametrize(("record", "code", "message"), BAD_RECORDS)
def test_batch_rows_that_cannot_be_answered(
    tokenizer: Tokenizer, record: dict[str, Any], code: str, message: str
) -> None:
    with pytest.raises(RowError) as caught:
        read(tokenizer, record)
    assert (caught.value.code, str(caught.value)[: len(message)]) == (code, message)


def test_an_endless_line_is_one_error_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 100)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * 1000 + b'"}\n{"a": 2}\n{"a": "' + b"y" * 86)
    long, fine, torn = JsonLines(path).rows()
    assert long.error is not None and long.error.code == "line_too_long"
    assert fine.value == {"a": 2} and fine.line == 2
    assert torn.error is not None and torn.error.code == "invalid_json"
    assert JsonLines(path).count() == 3


def test_byte_order_mark_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n   \r\n{"a": 2}')
    assert [(row.value, row.line) for row in JsonLines(path).rows()] == [({"a": 1}, 1), ({"a": 2}, 3)]


def test_csv_cells_are_text_and_bad_rows_do_not_stop_it(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,text\n1,"two\nlines, quoted ""so"""\n\n2\n3,\xff\n4,"a"b\n007,1e5\n5,"never closed\n'
    )
    rows = list(CsvTable(path).rows())
    found = [(row.line, row.value, None if row.error is None else str(row.error)) for row in rows]
    assert found == [
        (2, {"id": "1", "text": 'two\nlines, quoted "so"'}, None),
        (5, None, "the row has 1 cells; the header names 2 columns"),
        (6, None, "not CSV: a cell is not UTF-8"),
        (7, None, "not CSV: ',' expected after '\"'"),
        (8, {"id": "007", "text": "1e5"}, None),
        (9, None, "not CSV: unexpected end of data"),
    ]
    assert CsvTable(path).count() == len(rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: a CSV file begins with a line of column names"),
        ("a,a\n", "two columns are named 'a'"),
        ("a,\n", "column 2 has no name"),
    ],
)
def test_csv_headers_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        CsvTable(path)


def test_parquet_rows(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    times = pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns"))
    pq.write_table(pa.table({"a": ["x", None], "t": times, "l": [[1], [2, 3]]}), path)
    table = ParquetTable(path)
    rows = list(table.rows())
    assert table.count() == 2 and [row.index for row in rows] == [0, 1]
    assert rows[1].value == {"a": None, "t": None, "l": [2, 3]}
    assert rows[0].value is not None and rows[0].value["t"].microsecond == 123456
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(InputError, match="is not a Parquet file"):
        ParquetTable(path)


@pytest.mark.parametrize(
    ("head", "kind"), [(b"PAR1\x00", "parquet"), (b'\n {"a"', "jsonl"), (b"a,b\n", "csv"), (b"\xef\xbb\xbf{", "jsonl")]
)
def test_kind_of_standard_input(head: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "spool"
    path.write_bytes(head)
    assert sniff_kind(path) == kind


def test_a_batch_file_is_known_by_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("{bad\n" + json.dumps(without(chat(), "method")) + "\n")
    assert looks_like_batch(JsonLines(path))
    path.write_text('{"text": "a", "url": "b"}\n')
    assert not looks_like_batch(JsonLines(path))


def test_chat_body_becomes_prompt_and_parameters(tokenizer: Tokenizer) -> None:
    draft = read(
        tokenizer,
        chat(
            messages=[
                {"role": "developer", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}],
                    "name": "x",
                },
            ],
            model="m", max_completion_tokens=7, temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, n=2, seed=3,
            stop="END", presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.1, logit_bias={"5": -3},
            logprobs=True, top_logprobs=2, min_tokens=1, stop_token_ids=[9], ignore_eos=True, user="u",
            metadata={"a": "b"},
            store=True,
            service_tier="auto", stream=False, tools=[], tool_choice="none", parallel_tool_calls=True, best_of=2,
            response_format={"type": "text"}, include_stop_str_in_output=True, skip_special_tokens=False, suffix=None,
        ),
    )  # fmt: skip
    assert draft.prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not draft.special and draft.own_max_tokens and draft.model == "m" and draft.warnings == ()
    assert draft.params == SamplingParams(
        max_tokens=7, temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, n=2, seed=3, stop=("END",), presence_penalty=1,
        frequency_penalty=-1, repetition_penalty=1.1, logit_bias={5: -3}, logprobs=2, min_tokens=1, stop_token_ids=(9,),
        ignore_eos=True, include_stop_str_in_output=True, skip_special_tokens=False,
    )  # fmt: skip


def test_the_runs_settings_fill_what_a_body_leaves_out(tokenizer: Tokenizer) -> None:
    defaults = SamplingParams(max_tokens=5, temperature=0.3, constraint=Constraint("regex", "a+"))
    drafter = BatchDrafter(tokenizer, defaults, "error", "no model")
    assert drafter.draft(Row(0, 1, chat()), "a").params is defaults
    mixed = drafter.draft(Row(0, 1, chat(temperature=1, structured_outputs={"regex": "b+"})), "a").params
    assert mixed == replace(defaults, temperature=1, constraint=Constraint("regex", "b+"))


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "json_object"}}, Constraint("json", '{"type":"object"}')),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": {"a": 1}},
                }
            },
            Constraint("json", '{"a": 1}'),
        ),
        ({"structured_outputs": {"json": '{"a": 1}'}}, Constraint("json", '{"a": 1}')),
        ({"structured_outputs": {"json_object": True}}, Constraint("json", '{"type":"object"}')),
        ({"structured_outputs": {"json_object": False}}, None),
        ({"guided_choice": ["é", "b"]}, Constraint("choice", '["é", "b"]')),
        ({"guided_grammar": "start: /a/"}, Constraint("grammar", "start: /a/")),
    ],
)
def test_output_formats(tokenizer: Tokenizer, fields: dict[str, Any], constraint: Constraint | None) -> None:
    assert read(tokenizer, chat(**fields)).params.constraint == constraint


def test_completion_prompts(tokenizer: Tokenizer) -> None:
    assert read(tokenizer, completion()).prompt == "Hi"
    assert read(tokenizer, completion(prompt=["Hi"])).prompt == "Hi"
    assert read(tokenizer, completion(prompt=[5, 6])).prompt == (5, 6)
    assert read(tokenizer, completion(prompt=[[5, 6]])).prompt == (5, 6)
    assert read(tokenizer, completion(echo=True, logprobs=None)).echo
    assert read(tokenizer, completion(logprobs=3)).params.logprobs == 3


def test_a_last_message_can_be_continued(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, two, "}]
    draft = read(tokenizer, chat(messages=messages, continue_final_message=True))
    assert str(draft.prompt).endswith("<|im_start|>assistant\nOne, two,")


@pytest.mark.parametrize("last", ["<", "end", "n", "|", "\n<|im_end|>"])
def test_a_last_message_is_continued_though_the_template_writes_it_too(tokenizer: Tokenizer, last: str) -> None:
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": f"{last} "}]
    draft = read(tokenizer, chat(messages=messages, continue_final_message=True))
    assert str(draft.prompt).endswith(f"<|im_start|>user\nCount<|im_end|>\n<|im_start|>assistant\n{last}")


@pytest.mark.parametrize("change", ["upper", "truncate(9, True, '', 0)"])
def test_a_last_message_that_the_template_changes_cannot_be_continued(tokenizer: Tokenizer, change: str) -> None:
    template = (tokenizer.chat_template or "").replace("message['content']", f"message['content'] | {change}")
    changing = Tokenizer(tokenizer.backend, tokenizer.eos_token_ids, template)
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one, two, three"}]
    with pytest.raises(RowError, match="so it cannot be continued"):
        read(changing, chat(messages=messages, continue_final_message=True))


@pytest.mark.parametrize(("unknown", "warnings"), [("warn", ("body.audio: not supported, ignored",)), ("ignore", ())])
def test_unknown_fields_can_be_let_through(tokenizer: Tokenizer, unknown: Unknown, warnings: tuple[str, ...]) -> None:
    assert read(tokenizer, chat(audio={"a": 1}), unknown).warnings == warnings


def draft_table(tokenizer: Tokenizer, template: str, value: dict[str, Any], **settings: Any) -> Draft:
    drafter = TableDrafter(tokenizer, template, RunOptions(**settings), SamplingParams())
    row = Row(4, 6, value)
    return drafter.draft(row, drafter.name(row))


def test_templates_fill_from_columns(tokenizer: Tokenizer) -> None:
    assert draft_table(tokenizer, "Say {{ a }}", {"a": "x"}).prompt == (
        "<|im_start|>user\nSay x<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = draft_table(tokenizer, "Say {{ a }}{{ b }}\n", {"a": 1, "b": None}, chat=False, system="S")
    assert (plain.prompt, plain.special, plain.id) == ("S\n\nSay 1\n", True, "5")
    assert draft_table(tokenizer, "{{ a }}", {"a": "x", "key": 12}, id_column="key").id == "12"


@pytest.mark.parametrize(
    ("template", "value", "settings", "code", "message"),
    [
        ("{{ b }}", {"a": 1}, {}, "missing_column", "the prompt template: 'b' is undefined; the row has a"),
        ("{{ a.b.c }}", {"a": {}}, {}, "missing_column", "the prompt template: 'dict object' has no attribute 'b'"),
        ("{{ 1 / a }}", {"a": 0}, {}, "template", "the prompt template fails: ZeroDivisionError: division by zero"),
        ("{{ a.__class__ }}", {"a": 1}, {}, "template", "the prompt template fails: SecurityError"),
        ("{{ a }}", {"a": None}, {}, "empty_prompt", "the prompt is empty"),
        ("{{ a }}", {"a": 1}, {"id_column": "k"}, "missing_id", "the row has no id column 'k'; the row has a"),
        ("{{ a }}", {"a": 1, "k": ""}, {"id_column": "k"}, "missing_id", "column 'k' holds no id: \"\""),
    ],
)
def test_table_rows_that_cannot_be_answered(
    tokenizer: Tokenizer, template: str, value: dict[str, Any], settings: dict[str, Any], code: str, message: str
) -> None:
    with pytest.raises(RowError) as caught:
        draft_table(tokenizer, template, value, **settings)
    assert (caught.value.code, str(caught.value)[: len(message)]) == (code, message)


def test_a_template_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="the prompt template is wrong in line 2: "):
        compile_template("fine\n{{ oh")
    assert fill_template(compile_template("{% if a is defined %}x{% else %}y{% endif %}"), {}) == "y"


def test_constraints_from_flags(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"type": "nonsense"}')
    assert read_constraint(RunOptions(choice="a, b")) == Constraint("choice", '["a", "b"]')
    assert read_constraint(RunOptions(json_schema=str(schema))) == Constraint("json", '{"type": "object"}')
    for options, message in [
        ({"choice": "a", "regex": "b"}, "only one of --json-schema, --regex and --choice"),
        ({"choice": "a,,b"}, "--choice must be different words"),
        ({"expand": True}, "--expand needs --json-schema"),
        ({"json_schema": str(schema), "expand": True}, "--expand needs a schema with properties"),
        ({"json_schema": str(tmp_path / "none")}, "cannot read the JSON schema"),
        ({"json_schema": str(wrong)}, "the json constraint cannot be used: Invalid type: nonsense"),
        ({"regex": "(unclosed"}, "the regex constraint cannot be used: .*: regex parse error: unclosed group"),
        ({"regex": "a" * 2**18 + "b"}, "the regex constraint has 262,145 characters; 262,144 are allowed"),
    ]:
        with pytest.raises(InputError, match=message):
            read_constraint(RunOptions(**options))  # type: ignore[arg-type]


def make_drafts(params: SamplingParams, **settings: Any) -> Iterator[Draft]:
    for prompt in ("one two", (5, 6, 7), "three"):
        yield Draft(0, 1, "a", prompt, params, **settings)


def test_drafts_are_encoded_in_their_order(tokenizer: Tokenizer) -> None:
    drafts = list(make_drafts(SamplingParams()))
    assert [list(ids) for ids in encode_drafts(drafts, tokenizer)] == [
        tokenizer.encode("one two"), [5, 6, 7], tokenizer.encode("three"),
    ]  # fmt: skip


def test_the_context_bounds_a_row() -> None:
    draft = Draft(0, 1, "a", "", SamplingParams(max_tokens=20, min_tokens=15))
    shortened = make_request(draft, tuple(range(CONTEXT - 10)), CONTEXT)
    assert (shortened.params.max_tokens, shortened.params.min_tokens) == (10, 10)
    with pytest.raises(RowError, match=f"1014 tokens and max_tokens of 20 are more than the context's {CONTEXT}"):
        make_request(replace(draft, own_max_tokens=True), tuple(range(CONTEXT - 10)), CONTEXT)
    with pytest.raises(
        RowError, match=f"the prompt has {CONTEXT} tokens; the context holds {CONTEXT}, one of them for"
    ):
        make_request(draft, tuple(range(CONTEXT)), CONTEXT)


def test_equal_greedy_rows_share_a_key() -> None:
    def key(tokens: tuple[int, ...] = (1, 2), **settings: Any) -> bytes | None:
        return share_key(make_request(Draft(0, 1, "a", tokens, SamplingParams(**settings)), tokens, CONTEXT))

    assert key() == key(seed=5)
    assert key(temperature=1) is None
    others = [key((1, 3)), key((12,)), key(max_tokens=3), key(stop=("a",)), key(constraint=Constraint("regex", "a"))]
    assert len({key(), *others}) == 6


def test_equal_rows_whose_tools_are_read_in_other_ways_share_no_key() -> None:
    request, format = (
        make_request(Draft(0, 1, "a", (1,), SamplingParams()), (1,), CONTEXT),
        HermesFormat(lambda _: None),
    )
    keys = [share_key(request, each) for each in (None, format, format.single())]
    assert len(set(keys)) == 3 and share_key(request, HermesFormat(lambda _: None)) == keys[1]
