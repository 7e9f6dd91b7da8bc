"""Whole jobs through the real engine and a tiny model: going on, equal rows, errors, reports."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import (
    answer_of,
    batch_row,
    batch_rows,
    engine_options,
    read_lines,
    run,
    without_times,
    write_lines,
)

import headrace.job.feed as feed_module
from headrace.core import InputError, RowError, SamplingParams
from headrace.job.batch_rows import BatchDrafter
from headrace.job.feed import Feed, Flow
from headrace.job.inlet import EngineInlet
from headrace.job.journal import Journal
from headrace.job.progress import Progress, State, estimate_rest, format_progress, measure
from headrace.job.run import run_job
from headrace.job.sources import JsonLines, Row
from headrace.job.stop import JobStopped
from headrace.llm import LLM
from headrace.meter.counters import Counters
from headrace.meter.meter import Phase
from headrace.options import RunOptions, SamplingOptions
from headrace.schedule.window import ROW_BYTES, count_bytes

REPORT_KEYS = {
    "requests", "succeeded", "failed", "prompt_tokens", "cached_prompt_tokens", "computed_prompt_tokens",
    "output_tokens", "load_s", "wall_s", "total_tokens_per_s", "output_tokens_per_s", "steps", "preemptions",
    "kv_bytes_per_token", "kv_peak_bytes", "kv_budget_bytes", "peak_rss_bytes", "settings", "versions", "model_hash",
}  # fmt: skip


def test_the_report_holds_what_is_promised(tiny_model: Path, tmp_path: Path) -> None:
    rows = [*batch_rows(6), batch_row("bad", "x", nonsense=1)]
    report = run(tiny_model, write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert set(report) >= REPORT_KEYS
    assert (report["requests"], report["succeeded"], report["failed"], report["rows_total"]) == (7, 6, 1, 7)
    assert report["written"] == [str(tmp_path / name) for name in ("out.jsonl", "out.errors.jsonl")]
    assert report["prompt_tokens"] == report["cached_prompt_tokens"] + report["computed_prompt_tokens"]
    usage = [line["response"]["body"]["usage"] for line in read_lines(tmp_path / "out.jsonl")]
    assert report["output_tokens"] == report["job"]["output_tokens"] == sum(each["completion_tokens"] for each in usage)
    assert report["prompt_tokens"] == report["job"]["prompt_tokens"] == sum(each["prompt_tokens"] for each in usage)
    assert report["settings"]["max_tokens"] == 4 and report["settings"]["precision"] == "fp32"
    assert 0 < report["kv_peak_bytes"] <= report["kv_budget_bytes"] and report["peak_rss_bytes"] > 10**7


def test_rows_come_out_in_the_order_of_the_input(tiny_model: Path, tmp_path: Path) -> None:
    rows = [batch_row(f"r{index}", "turn " * (37 * index % 23), max_tokens=1 + 7 * index % 11) for index in range(30)]
    run(tiny_model, write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert [line["custom_id"] for line in read_lines(tmp_path / "out.jsonl")] == [f"r{index}" for index in range(30)]


def test_equal_greedy_rows_are_computed_once(tiny_model: Path, tmp_path: Path) -> None:
    rows = [batch_row(f"r{index}", f"question {index % 3}") for index in range(30)]
    rows += [batch_row(f"warm{index}", "question 0", temperature=1.0) for index in range(3)]
    report = run(tiny_model, write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    lines = read_lines(tmp_path / "out.jsonl")
    assert report["rows_shared"] == 27 and report["requests"] == 33
    assert report["job"]["output_tokens"] == sum(
        line["response"]["body"]["usage"]["completion_tokens"] for line in lines
    )
    assert report["output_tokens"] < report["job"]["output_tokens"]
    assert all(answer_of(line) == answer_of(lines[index % 3]) for index, line in enumerate(lines[:30]))
    alone = run(tiny_model, write_lines(tmp_path / "one.jsonl", rows[:1]), tmp_path / "one.out.jsonl")
    assert alone["output_tokens"] == 4 and answer_of(read_lines(tmp_path / "one.out.jsonl")[0]) == answer_of(lines[0])


def test_an_equal_row_is_answered_from_the_journal(tiny_model: Path, tmp_path: Path) -> None:
    rows = [batch_row("first", "same"), *batch_rows(600, max_tokens=1), batch_row("last", "same")]
    report = run(tiny_model, write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    lines = read_lines(tmp_path / "out.jsonl")
    assert report["rows_shared"] == 1 and answer_of(lines[0]) == answer_of(lines[-1])


def test_a_complete_job_is_not_run_again(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", batch_rows(3)), tmp_path / "out.jsonl"
    report = run(tiny_model, source, output)
    written = output.stat().st_mtime_ns
    assert run(tiny_model, source, output, quiet=False) == report
    printed = capsys.readouterr()
    assert output.stat().st_mtime_ns == written
    assert "all 3 rows are answered already" in printed.err and "3 done, 3 succeeded, 0 failed" in printed.out
    before = output.read_bytes()
    output.unlink()
    assert run(tiny_model, source, output) == report
    assert output.read_bytes() == before


def test_a_complete_job_says_where_its_answers_are_now(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    source = write_lines(tmp_path / "here" / "in.jsonl", [*batch_rows(2), batch_row("bad", "x", nonsense=1)])
    report = run(tiny_model, source, tmp_path / "here" / "out.jsonl")
    (tmp_path / "here").rename(tmp_path / "there")
    moved = run(tiny_model, tmp_path / "there" / "in.jsonl", tmp_path / "there" / "out.jsonl")
    names = "out.jsonl", "out.errors.jsonl"
    assert report["written"] == [str(tmp_path / "here" / name) for name in names]
    assert moved == report | {"written": [str(tmp_path / "there" / name) for name in names]}


def test_a_neighbours_file_is_not_said_to_be_the_jobs(tiny_model: Path, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", [{"text": "hello"}]), tmp_path / "out.jsonl"
    (tmp_path / "out.errors.jsonl").write_text("somebody's\n")
    for _ in range(2):
        assert run(tiny_model, source, output, prompt="{{ text }}")["written"] == [str(output)]


def test_a_job_of_other_settings_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", batch_rows(3)), tmp_path / "out.jsonl"
    run(tiny_model, source, output)
    before = output.read_bytes()
    with pytest.raises(InputError, match="max_tokens was 4 and is 5"):
        run(tiny_model, source, output, {"max_tokens": 5})
    with pytest.raises(InputError, match='unknown_fields was "error" and is "warn"'):
        run(tiny_model, source, output, unknown_fields="warn")
    write_lines(source, batch_rows(4))
    with pytest.raises(InputError, match="input was "):
        run(tiny_model, source, output)
    assert output.read_bytes() == before
    assert run(tiny_model, source, output, fresh=True)["requests"] == 4


@pytest.mark.parametrize(("limit", "stops"), [("3", True), ("25%", True), ("4", False), ("30%", False)])
def test_too_many_errors_stop_the_job(limit: str, stops: bool, tiny_model: Path, tmp_path: Path) -> None:
    rows = [batch_row(f"bad{index}", "x", nonsense=1) for index in range(3)] + batch_rows(9)
    source, output = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    if not stops:
        assert run(tiny_model, source, output, max_errors=limit)["failed"] == 3
        return
    with pytest.raises(
        JobStopped, match=r"3 rows failed, which --max-errors .* does not allow; the first is line 1: body"
    ) as stop:
        run(tiny_model, source, output, max_errors=limit)
    assert stop.value.exit_code == 1 and not output.exists()
    # Everything until then is kept: without the limit the job goes on from there.
    report = run(tiny_model, source, output)
    assert report["rows_resumed"] >= 3 and report["requests"] + report["rows_resumed"] == 12
    assert len(read_lines(output)) == 9


def test_too_many_errors_stop_the_job_however_often_it_is_run(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [batch_row(f"bad{index}", "x", nonsense=1) for index in range(4)]
    for name, rows in (("all", bad), ("some", bad + batch_rows(600))):
        source, output = write_lines(tmp_path / f"{name}.jsonl", rows), tmp_path / f"{name}.out.jsonl"
        for loaded in (True, False):
            with pytest.raises(JobStopped, match="4 rows failed, which --max-errors 1 does not allow"):
                run(tiny_model, source, output, max_errors="1", quiet=False)
            assert ("loading" in capsys.readouterr().err) is loaded and not output.exists()
    assert run(tiny_model, tmp_path / "all.jsonl", tmp_path / "all.out.jsonl")["job"]["failed"] == 4


def test_errors_of_the_last_step_count(tiny_model: Path, tmp_path: Path) -> None:
    # A grammar that can be used, but allows more after its first token than its parser holds.
    names = [f"rule{index}" for index in range(1000)]
    rules = [f'start: "a" ({" | ".join(names)})', *(f'{name}: {name} "b" | "{name}"' for name in names)]
    grammar = "\n".join(rules)
    source = write_lines(tmp_path / "in.jsonl", [batch_row("bad", "x", guided_grammar=grammar)])
    with pytest.raises(JobStopped, match=r"^1 rows failed, .* line 1: the constraint failed while running"):
        run(tiny_model, source, tmp_path / "out.jsonl", max_errors="1")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_share_of_errors_is_exact(tiny_model: Path, tmp_path: Path) -> None:
    rows = [batch_row(f"bad{index}", "x", nonsense=1) for index in range(7)] + batch_rows(93, max_tokens=1)
    with pytest.raises(JobStopped, match=r"^7 rows failed"):
        run(tiny_model, write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", max_errors="7%")


Pipe = Callable[[bytes], None]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Pipe:
    """Gives these bytes to whoever reads standard input."""
    return lambda data: monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def test_rows_of_a_finished_or_refused_job_are_not_kept(pipe: Pipe, tiny_model: Path, tmp_path: Path) -> None:
    first, other = (json.dumps(batch_row(name, "x")).encode() for name in ("first", "other"))
    output, spool = tmp_path / "out.jsonl", tmp_path / "out.jsonl.input"
    pipe(first)
    report = run(tiny_model, "-", output)
    pipe(other)
    with pytest.raises(InputError, match="belongs to a run with other settings: input was"):
        run(tiny_model, "-", output)
    assert not spool.exists()
    pipe(first)
    assert run(tiny_model, "-", output) == report and not spool.exists()
    # An unfinished job that is refused for its settings still needs its rows.
    pipe(json.dumps(batch_row("bad", "x", nonsense=1)).encode())
    with pytest.raises(JobStopped):
        run(tiny_model, "-", tmp_path / "new.jsonl", max_errors="1")
    pipe(b"")
    with pytest.raises(InputError, match="max_tokens was 4 and is 5"):
        run(tiny_model, "-", tmp_path / "new.jsonl", {"max_tokens": 5})
    pipe(b"")
    assert run(tiny_model, "-", tmp_path / "new.jsonl")["job"]["failed"] == 1


def test_standard_input_is_read_once_and_kept(pipe: Pipe, tiny_model: Path, tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in [*batch_rows(4), batch_row("bad", "x", nonsense=1)]).encode()
    pipe(text)
    with pytest.raises(JobStopped):
        run(tiny_model, "-", tmp_path / "out.jsonl", max_errors="1")
    assert (tmp_path / "out.jsonl.input").read_bytes() == text
    pipe(b"other\n")
    with pytest.raises(InputError, match=r"standard input is not what .* has kept"):
        run(tiny_model, "-", tmp_path / "out.jsonl")
    pipe(b"")
    assert run(tiny_model, "-", tmp_path / "out.jsonl")["job"]["rows"] == 5
    assert not (tmp_path / "out.jsonl.input").exists()
    pipe(b"")
    with pytest.raises(InputError, match="standard input is empty"):
        run(tiny_model, "-", tmp_path / "none.jsonl")
    assert not list(tmp_path.glob("none*"))
    # Rows that no job began with may be replaced.
    (tmp_path / "new.jsonl.input").write_bytes(b"left by a run that could not begin")
    pipe(text)
    assert run(tiny_model, "-", tmp_path / "new.jsonl")["job"]["rows"] == 5


def test_a_table_from_standard_input(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"text\nwheel\n")))
    run(tiny_model, "-", tmp_path / "out.jsonl", prompt="{{ text }}")
    assert read_lines(tmp_path / "out.jsonl")[0]["text"] == "wheel"


def test_random_rows_depend_on_their_seed_and_id_only(tiny_model: Path, tmp_path: Path) -> None:
    rows = batch_rows(6, temperature=1.0, seed=5)
    run(tiny_model, write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", {"max_tokens": 12})
    run(
        tiny_model,
        write_lines(tmp_path / "turned.jsonl", rows[::-1]),
        tmp_path / "turned.out.jsonl",
        {"max_tokens": 12},
    )
    assert without_times(tmp_path / "out.jsonl") == without_times(tmp_path / "turned.out.jsonl")[::-1]


def test_a_row_too_long_fails_and_a_runs_default_is_lowered(tiny_model: Path, tmp_path: Path) -> None:
    rows = [batch_row("long", "a " * 5000), batch_row("own", "hello", max_tokens=1020), batch_row("default", "hello")]
    report = run(tiny_model, write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", {"max_tokens": 1020})
    errors = {line["custom_id"]: line["error"]["code"] for line in read_lines(tmp_path / "out.errors.jsonl")}
    assert errors == {"long": "context_length", "own": "context_length"}
    assert report["rows_shortened"] == 1 and len(read_lines(tmp_path / "out.jsonl")) == 1


def test_an_impossible_schema_fails_its_row_only(tiny_model: Path, tmp_path: Path) -> None:
    rows = [batch_row("bad", "x", guided_regex="(unclosed"), batch_row("odd", "x", guided_json={"type": "nonsense"})]
    report = run(tiny_model, write_lines(tmp_path / "in.jsonl", [*rows, *batch_rows(2)]), tmp_path / "out.jsonl")
    errors = read_lines(tmp_path / "out.errors.jsonl")
    assert [line["error"]["code"] for line in errors] == ["constraint", "constraint"] and report["succeeded"] == 2


def test_what_is_said_is_said_once(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = batch_rows(9, model="gpt-x", audio={"a": 1})
    run(
        tiny_model, write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", unknown_fields="warn", quiet=False
    )
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("rows ask for the model 'gpt-x'; tiny answers them") == 1
    assert said.count("body.audio: not supported, ignored") == 1
    body = read_lines(tmp_path / "out.jsonl")[8]["response"]["body"]
    assert (body["model"], body["warnings"]) == ("gpt-x", ["body.audio: not supported, ignored"])


def test_many_messages_of_rows_keep_none_of_the_jobs_own(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(State(1, 0, 0, 0), quiet=False, as_json=False)
    for number in range(1000):
        progress.say_of_rows(f"row {number} is odd")
    for _ in range(2):
        progress.say("the full cache takes over")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 101 and said[-1] == "headrace: the full cache takes over"


def test_json_progress_is_lines_of_json(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "in.jsonl", batch_rows(3))
    report = run(tiny_model, source, tmp_path / "out.jsonl", quiet=False, json=True)
    printed = capsys.readouterr()
    events = [json.loads(line) for line in printed.out.splitlines()]
    assert printed.err == "" and [event["event"] for event in events] == ["message", "forecast", "progress", "report"]
    assert events[0]["message"].startswith("loading ")
    assert events[1]["seconds"] is None, "nobody has measured a tiny random model's steps"
    assert (events[2]["rows_done"], events[2]["rows_total"], events[2]["errors"]) == (3, 3, 0)
    assert {name: value for name, value in events[3].items() if name != "event"} == report


def test_quiet_prints_nothing(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_model, write_lines(tmp_path / "in.jsonl", batch_rows(2)), tmp_path / "out.jsonl")
    assert capsys.readouterr() == ("", "")


def test_time_to_go_weighs_rows_by_their_tokens() -> None:
    flow = Flow(rows=40, prompt_tokens=4000, output_tokens=100)
    state = State(rows_total=100, rows_done=30, errors=0, rows_before=20, flow=flow)
    phases = {"prefill": Phase(seconds=6.0), "decode": Phase(seconds=24.0)}
    # 80 rows of 100 prompt tokens, of which 3,000 took 6 s; of 10 output tokens, of which 300 took 24 s. A tenth of the
    # run passed between steps.
    assert estimate_rest(state, phases, 3000, 300, 33.0) == round((5000 / 3000 * 6 + 500 / 300 * 24) * 1.1, 1)
    assert estimate_rest(State(100, 20, 0, 20, flow), phases, 3000, 300, 33.0) is None
    none = {"prefill": Phase(), "decode": Phase()}
    assert estimate_rest(State(100, 60, 40, 20), none, 0, 0, 4.0) == 4.0
    assert estimate_rest(State(30, 30, 0, 20, Flow(10, 1000, 100)), phases, 1000, 100, 33.0) == 0.0
    # Short rows are done first: those that are left have generated more than rows did on average, and are not done.
    last = State(30, 10, 0, 0, Flow(30, 3000, 100))
    assert estimate_rest(last, phases, 3000, 1000, 33.0) == round((20 * 10 / 2) / 1000 * 24 * 1.1, 1)
    # Prompts alone: scores, or answers of one token.
    alone = {"prefill": Phase(seconds=6.0), "decode": Phase()}
    assert estimate_rest(State(100, 50, 0, 0, Flow(100, 1000, 0)), alone, 600, 0, 6.0) == 4.0
    counters = Counters(computed_prompt_tokens=2250, cached_prompt_tokens=750, output_tokens=300)
    counters.kv_used_bytes, counters.kv_budget_bytes = 2**20, 2**21
    assert format_progress(measure(state, counters, phases, 33.0)) == (
        "30/100 rows (30%), 0 errors | 91 prompt + 9 output tokens/s | 25% of prompts cached | "
        "KV 1.0 MiB of 2.0 MiB | 33.0 s, 55.0 s to go"
    )
    slow = measure(state, Counters(computed_prompt_tokens=3000, output_tokens=300), phases, 93.0, before=60.0)
    assert slow["elapsed_s"] == 93.0 and slow["eta_s"] == 55.0, "reading is done once"
    reading = State(rows_total=100, rows_done=20, errors=0, rows_before=20, flow=flow)
    assert format_progress(measure(reading, Counters(), none, 6.0)) == "60/100 rows read, 6.0 s"


def test_until_a_row_is_finished_the_time_to_go_is_the_forecast(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LLM(**vars(engine_options(tiny_model))) as llm:
        progress = Progress(State(rows_total=9, rows_done=0, errors=0, rows_before=0), quiet=False, as_json=True)
        progress.update(llm.engine.counters, llm.engine.meter, last=True)
        progress.show_forecast({"seconds": 1000.0})
        progress.update(llm.engine.counters, llm.engine.meter, last=True)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["progress", "forecast", "progress"]
    assert events[0]["eta_s"] is None and 900 < events[2]["eta_s"] <= 1000


class CountingDrafter:
    """A real drafter's rows, counting how many were asked for."""

    def __init__(self, drafter: Any) -> None:
        self.drafter = drafter
        self.asked = 0
        self.named = bool(drafter.named)

    def name(self, row: Row) -> str:
        self.asked += 1
        return str(self.drafter.name(row))

    def draft(self, row: Row, row_id: str) -> Any:
        return self.drafter.draft(row, row_id)


@pytest.mark.parametrize("kind", ["equal", "different", "wrong"])
def test_reading_pauses_however_long_the_input_is(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    def rows() -> Any:
        for index in range(10**9):
            body: dict[str, Any] = {"prompt": [5, 6, 7] if kind == "equal" else [5 + index % 300, 5 + index // 300]}
            record = {"custom_id": str(index), "method": "POST", "url": "/v1/completions", "body": body}
            yield Row(index, index + 1, record, RowError("bad", "bad") if kind == "wrong" else None)

    with LLM(**vars(engine_options(tiny_model)) | {"window_bytes": 2**20}) as llm:
        drafter = CountingDrafter(BatchDrafter(llm.tokenizer, SamplingParams(max_tokens=2), "error", str(tiny_model)))
        feed = Feed(rows(), drafter, EngineInlet(llm.engine), llm.tokenizer, Journal(tmp_path / "journal"))
        finished: list[Any] = []
        while not finished and feed.wants_rows():
            finished = feed.top_up()
        assert len(finished) == (256 if kind == "wrong" else 0)
        # Whole reads of 256 rows, until what they take is a MiB.
        equal, different = -(-(2**20) // ROW_BYTES), -(-(2**20) // count_bytes(2))
        asked = {"equal": -(-equal // 256) * 256, "different": -(-different // 256) * 256, "wrong": 0}[kind]
        assert drafter.asked == asked
        assert llm.engine.unfinished == {"equal": 1, "different": asked, "wrong": 0}[kind]


@pytest.mark.parametrize(("prompt", "rows_a_call"), [("a wheel " * 125, 10), ([5] * 100, 12)])
def test_a_read_ends_with_so_much_text(
    prompt: Any, rows_a_call: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "BYTES_A_CALL", 40_000)
    body = {"prompt": prompt}
    rows = (
        Row(index, index + 1, {"custom_id": str(index), "method": "POST", "url": "/v1/completions", "body": body})
        for index in range(30)
    )
    with LLM(**vars(engine_options(tiny_model))) as llm:
        drafter = BatchDrafter(llm.tokenizer, SamplingParams(max_tokens=2), "error", str(tiny_model))
        feed = Feed(rows, drafter, EngineInlet(llm.engine), llm.tokenizer, Journal(tmp_path / "journal"))
        read = []
        while not feed.exhausted:
            before = feed.flow.rows
            feed.top_up()
            read.append(feed.flow.rows - before)
    assert read == ([10, 10, 10, 0] if rows_a_call == 10 else [12, 12, 6, 0])


def test_a_library_call_is_a_whole_job(tiny_model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", batch_rows(2))
    options = engine_options(tiny_model)
    report = run_job(str(source), str(tmp_path / "out.jsonl"), options, SamplingOptions(), RunOptions(quiet=True))
    assert report["job"]["rows"] == 2 and JsonLines(tmp_path / "out.jsonl").count() == 2
    assert not (tmp_path / "out.jsonl.lock").exists()
