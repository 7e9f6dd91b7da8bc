"""A budget for the loss of the KV cache: what is measured, what is chosen, when the full cache takes over."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import engine_options, read_journal, read_lines, write_lines
from tiny import make_tiny_model

from headrace.cache.policies.base import KVShape
from headrace.cache.policies.choice import CANDIDATES, FULL, make_policy
from headrace.checkpoint import open_checkpoint
from headrace.core import InputError, Request, SamplingParams
from headrace.engine.forward import AnswerReader
from headrace.engine.tuned import apply_tuned, save_tuned
from headrace.job import kv_budget
from headrace.job.guard import CHECK_EVERY
from headrace.job.intake import make_fingerprint, name_system, read_ask
from headrace.job.journal import Journal
from headrace.job.kv_budget import KVChoice, arrange, count_row_bytes, list_rows, list_trials, read_kv_choice
from headrace.job.loss import Loss, LossMeter, answer_fully
from headrace.job.progress import Progress, State
from headrace.job.run import run_job
from headrace.job.sample import LEAST_ROWS, choose_places, draw_sample
from headrace.job.sources import JsonLines
from headrace.job.table import TableDrafter
from headrace.llm import LLM
from headrace.meter.report import format_loss, format_report, format_share
from headrace.options import EngineOptions, RunOptions, SamplingOptions

# Nothing of so short a text is ever sealed: candidates lose nothing on it, and take more than the full cache.
SHORT, LONG = 12, 150
MANY = 3 * CHECK_EVERY + 20
# Between what the sample of drifting rows loses and what their checked ones do.
BUDGET = "100%"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("kv_loss") / "tiny", head_dim=32)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(**vars(options(folder))) as found:
        yield found


def options(folder: Path, **changes: Any) -> EngineOptions:
    return engine_options(folder, **({"block_size": 32, "tuned": False} | changes))


def make_text(number: int, length: int) -> str:
    source = random.Random(number)
    return "".join(source.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))


def make_rows(lengths: list[int]) -> list[dict[str, Any]]:
    return [{"text": make_text(number, length)} for number, length in enumerate(lengths)]


def make_drifting_rows() -> list[dict[str, Any]]:
    """Rows whose sample says that memory is saved and little lost, while those that are checked later lose much."""
    lengths = [LONG if (number + 1) % CHECK_EVERY == 0 or number >= 610 else SHORT for number in range(MANY)]
    assert not any(lengths[place] == LONG for place in choose_places(MANY))
    for place in choose_places(MANY)[:2]:
        lengths[place] = 400
    return make_rows(lengths)


def run(folder: Path, source: Path, output: Path, engine: dict[str, Any] | None = None, **run: Any) -> dict[str, Any]:
    settings = RunOptions(**({"prompt": "{{ text }}", "chat": False, "quiet": True} | run))
    own = SamplingOptions(max_tokens=8, ignore_eos=True)
    return run_job(str(source), str(output), options(folder, **(engine or {})), own, settings)


def make_requests(llm: LLM, lengths: list[int], **params: Any) -> list[Request]:
    own = SamplingParams(**({"max_tokens": 12, "ignore_eos": True} | params))
    prompts = (llm.tokenizer.encode(make_text(number, length)) for number, length in enumerate(lengths))
    return [Request(str(number), tuple(prompt), own) for number, prompt in enumerate(prompts)]


def test_a_loss_is_the_rise_of_perplexity_with_its_standard_error() -> None:
    rows = [(0.5, 10, True), (-0.1, 4, False), (0.3, 20, True), (0.0, 1, False)]
    loss = Loss()
    for row in rows:
        loss.add(*row)
    mean = sum(delta for delta, _, _ in rows) / sum(tokens for _, tokens, _ in rows)
    spread = sum((delta - mean * tokens) ** 2 for delta, tokens, _ in rows)
    assert loss.share == pytest.approx(math.exp(mean) - 1)
    assert loss.error == pytest.approx(math.sqrt(spread * 4 / 3) / 35 * math.exp(mean))
    assert (loss.describe()["rows"], loss.describe()["changed_rows"], loss.describe()["tokens"]) == (4, 2, 35)
    assert Loss().share == Loss().error == 0.0


@pytest.mark.parametrize("kv", [FULL, CANDIDATES[0], "streaming(keep=0.5)"])
def test_answers_are_read_as_the_engine_computes_them(kv: str, folder: Path) -> None:
    """The reader's log probabilities are those that the engine has given the same tokens, chunks or not."""
    with LLM(**vars(options(folder, kv=kv, step_tokens=64))) as llm:
        requests = make_requests(llm, [5, 70, 200], logprobs=1)
        outputs = llm.generate([list(each.prompt_token_ids) for each in requests], requests[0].params)
        reader = AnswerReader(llm.engine.model, make_policy(kv), llm.options, 300)
        for output in outputs:
            (choice,) = output.outputs
            hidden = reader.read(output.prompt_token_ids, choice.token_ids)
            logprobs = llm.engine.model.logits(hidden).log_softmax(-1)
            found = [float(row[token]) for row, token in zip(logprobs, choice.token_ids, strict=True)]
            assert found == [each.logprob for each in choice.logprobs or []]


def test_the_full_cache_loses_nothing_and_smaller_ones_something(llm: LLM) -> None:
    answered = answer_fully(llm, make_requests(llm, [SHORT, 60, 90, 120, 150], temperature=1.0, n=3))
    assert [len(each.tokens) for each in answered] == [12] * 5
    losses = {}
    for kv in (FULL, *CANDIDATES):
        losses[kv], meter = Loss(), LossMeter(llm, kv, 300)
        for each in answered:
            meter.compare(each, losses[kv])
    assert (losses[FULL].delta, losses[FULL].changed, losses[FULL].rows) == (0.0, 0, 5)
    shares = [losses[kv].share for kv in CANDIDATES]
    assert shares[0] > shares[2] > abs(shares[3]) and losses[CANDIDATES[0]].changed > 0


def test_what_cannot_be_answered_is_not_measured(llm: LLM) -> None:
    wrong = [Request("wrong", (10**6,), SamplingParams()), Request("empty", (), SamplingParams())]
    assert answer_fully(llm, wrong) == []
    assert len(answer_fully(llm, [*wrong, *make_requests(llm, [SHORT])])) == 1


def test_a_sample_is_spread_and_short(llm: LLM, tmp_path: Path) -> None:
    assert choose_places(2) == [0, 1] and choose_places(16) == list(range(16))
    places = choose_places(1000)
    assert len(places) == 16 and places[0] > 0 and {b - a for a, b in pairwise(places)} <= {62, 63}
    drafter = TableDrafter(llm.tokenizer, "{{ text }}", RunOptions(chat=False), SamplingParams(max_tokens=4))

    def draw(rows: list[dict[str, Any]], context: int) -> list[Request]:
        source = JsonLines(write_lines(tmp_path / "in.jsonl", rows))
        return draw_sample(source, len(rows), drafter, llm.tokenizer, context)

    rows = make_rows([SHORT] * 40)
    assert [each.id for each in draw(rows, 1024)] == [str(place + 1) for place in choose_places(40)]
    rows[choose_places(40)[3]] = {"other": 1}
    assert len(draw(rows, 1024)) == 15
    thinned = draw(make_rows([4000] * 40), 8192)
    assert LEAST_ROWS <= len(thinned) < 8


def test_a_generous_budget_takes_the_smallest_cache(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", make_rows([LONG] * 20)), tmp_path / "out.jsonl"
    report = run(folder, source, output, kv_loss="5000%", quiet=False)
    said = " ".join(capsys.readouterr().err.split())
    found = report["kv_loss"]
    assert found["kv"] == CANDIDATES[0] == report["settings"]["kv"] and found["budget"] == 50.0
    assert [each["kv"] for each in found["candidates"]] == [CANDIDATES[0]]
    assert found["candidates"][0]["bytes_per_token"] == report["kv_bytes_per_token"] < found["full_bytes_per_token"]
    assert found["candidates"][0]["row_bytes"] < found["full_row_bytes"]
    assert found["sample"]["rows"] == found["sampled_rows"] == 16 and found["sample"]["tokens"] == 16 * 8
    assert found["checked"]["rows"] == 0 and not found["fell_back"] and found["measure_s"] > 0
    assert f"kv {CANDIDATES[0]} loses" in said and "taken" in said
    # What it took is no part of what the job's own steps took.
    assert report["time_by_part_s"]["measuring loss"] > 0
    steps = sum(report[phase]["seconds"] for phase in ("prefill", "decode"))
    assert sum(each["seconds"] for each in report["operators"].values()) < steps
    assert f"{CANDIDATES[0]} lost {format_loss(found['sample'], 'sampled rows')}" in format_report(report)
    other = run(folder, source, tmp_path / "other.jsonl", {"kv": CANDIDATES[0]})
    assert output.read_bytes() == (tmp_path / "other.jsonl").read_bytes() and other["kv_loss"] is None


def test_a_cache_that_takes_more_for_short_rows_is_not_smaller(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", make_rows([SHORT] * 20))
    found = run(folder, source, tmp_path / "out.jsonl", kv_loss="5000%", quiet=False)["kv_loss"]
    assert found["kv"] == FULL and found["candidates"] == [] and found["sampled_rows"] == 16
    assert found["full_row_bytes"] == 32 << 10, "one block"
    assert "no other cache takes less for rows like these" in " ".join(capsys.readouterr().err.split())


def test_candidates_are_ranked_by_the_blocks_of_the_sampled_rows(llm: LLM) -> None:
    # SmolLM2-135M.
    shape = KVShape((None,) * 30, 3, 64, torch.bfloat16)
    plain, kivi = (make_policy(kv).arrange(shape, 32) for kv in (FULL, CANDIDATES[0]))
    less = [count_row_bytes(kivi, [(length, 8)]) < count_row_bytes(plain, [(length, 8)]) for length in (12, 50, 90)]
    assert less == [False, False, True]
    assert count_row_bytes(plain, [(12, 8), (300, 8)]) == (1 + 10) * plain.block_bytes // 2

    def rank(length: int) -> list[str]:
        rows, quiet = [(length, 8)], Progress(State(1, 0, 0, 0), True, False)
        return [trial.kv for trial in list_trials(llm, rows, count_row_bytes(arrange(llm, FULL), rows), quiet)]

    # A block that is exact for a layer of this model is enough for two sealed ones, in any bits.
    others = [kv for kv in CANDIDATES if "first" not in kv]
    assert rank(12) == rank(90) == [] and rank(150) == others and rank(250) == [*others, CANDIDATES[1]]


def test_an_answer_that_was_cut_counts_as_long_as_it_may_be(llm: LLM) -> None:
    requests = make_requests(llm, [SHORT]) + make_requests(llm, [LONG], max_tokens=200)
    # The last prompt once more, two continuations of another length.
    params = replace(requests[1].params, max_tokens=300, n=2)
    requests.append(replace(requests[1], params=params))
    long = len(requests[1].prompt_token_ids)
    assert list_rows(answer_fully(llm, requests)) == [
        (len(requests[0].prompt_token_ids), 12),
        (long, 200),
        *[(long, 300)] * 2,
    ]


@pytest.mark.parametrize(
    ("budget", "lengths", "said"),
    [
        ("0%", [LONG] * 5, "only the full cache is sure to lose nothing"),
        ("0.0001%", [LONG] * 5, "no smaller cache is known to keep within 0%"),
        ("50%", [LONG] * 2, "2 rows could be measured"),
    ],
)
def test_the_full_cache_is_taken_where_nothing_smaller_will_do(
    budget: str,
    lengths: list[int],
    said: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On so few rows of a random model 8 bits gain as often as they lose.
    monkeypatch.setattr(kv_budget, "CANDIDATES", [each for each in CANDIDATES if "k=8" not in each])
    source = write_lines(tmp_path / "in.jsonl", make_rows(lengths))
    report = run(folder, source, tmp_path / "out.jsonl", kv_loss=budget, quiet=False)
    assert report["kv_loss"]["kv"] == FULL == report["settings"]["kv"] and report["kv_loss"]["sample"] is None
    assert said in " ".join(capsys.readouterr().err.split()) and "allowed" in format_report(report)
    run(folder, source, tmp_path / "plain.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()


def test_a_block_size_that_cannot_be_sealed_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", make_rows([LONG] * 5))
    report = run(folder, source, tmp_path / "out.jsonl", {"block_size": 16}, kv_loss="5%", quiet=False)
    assert report["kv_loss"]["kv"] == FULL and report["kv_loss"]["candidates"] == []
    assert "block_size 16 cannot be sealed" in " ".join(capsys.readouterr().err.split())


def test_the_full_cache_takes_over_when_checked_rows_lose_too_much(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, engine = make_drifting_rows(), {"schedule": "fcfs", "kv_cache_bytes": 600_000}
    # More than the full cache holds, and waiting while it takes over.
    rows[615] = {"text": make_text(615, 800)}
    source, output = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    report = run(folder, source, output, engine, kv_loss=BUDGET, quiet=False)
    found = report["kv_loss"]
    assert found["kv"] == CANDIDATES[0] and 0 < found["sample"]["loss"] < found["budget"]
    assert found["fell_back"] and found["fell_back_after_checks"] == found["checked"]["rows"] == LEAST_ROWS
    assert found["checked"]["loss"] - found["checked"]["error"] > found["budget"]
    assert report["kv_bytes_per_token"] == found["full_bytes_per_token"], "the full cache has taken over"
    assert report["settings"]["kv"] == FULL
    assert "rows that have not begun are computed with the full cache" in " ".join(capsys.readouterr().err.split())
    assert "then the full cache took over" in format_report(report)
    lines = read_lines(output)
    assert [line["text"] for line in lines] == [row["text"] for row in rows]
    assert [number for number, line in enumerate(lines) if line["error"]] == [615] and report["failed"] == 1
    assert "the budget holds 18" in str(lines[615]["error"]), "blocks of the full cache"
    plain = write_lines(tmp_path / "plain.jsonl", [row for row in rows[610:] if row is not rows[615]])
    run(folder, plain, tmp_path / "plain.out.jsonl")
    late = [line["output"] for line in lines[610:] if not line["error"]]
    assert late == [line["output"] for line in read_lines(tmp_path / "plain.out.jsonl")]


def test_a_killed_job_goes_on_with_its_choice_and_its_checks(folder: Path, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", make_drifting_rows()), tmp_path / "out.jsonl"
    process = subprocess.Popen(command(folder, source, output))
    while len(read_journal(output)) < 2 * CHECK_EVERY + 10:
        assert process.poll() is None, "the job ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    known = read_journal(output)
    before = reopen(output)
    assert before.kv == CANDIDATES[0] and before.checks.rows >= 2 and len(known) < MANY
    report = run(folder, source, output, {"schedule": "fcfs"}, kv_loss=BUDGET)
    after = reopen(output)
    assert (after.kv, after.trials, after.seconds) == (before.kv, before.trials, before.seconds)
    assert after.fell_back == LEAST_ROWS and report["kv_loss"]["fell_back"]
    assert known.items() <= read_journal(output).items() and len(read_lines(output)) == MANY
    assert report["rows_resumed"] >= len(known)
    # Nothing is measured again, and a job that has fallen back does not try once more.
    assert run(folder, source, output, kv_loss=BUDGET)["kv_loss"] == report["kv_loss"]


def command(folder: Path, source: Path, output: Path) -> list[str]:
    """The job of `run` as a process of its own."""
    words = ["run", str(source), "-o", str(output), "--model", str(folder), "--prompt", "{{ text }}", "--no-chat"]
    words += ["--max-tokens", "8", "--ignore-eos", "--precision", "fp32", "--no-tuned", "--schedule", "fcfs"]
    words += ["--threads", "1", "--max-sequences", "8", "--kv-cache-bytes", "4MiB", "--kv-loss", BUDGET, "--quiet"]
    return [sys.executable, "-m", "headrace", *words]


def reopen(output: Path) -> KVChoice:
    journal = Journal(Path(f"{output}.journal"))
    found = read_kv_choice(journal)
    journal.close()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("engine", "own", "message"),
    [
        ({}, {"kv_loss": "1"}, "kv_loss must be a share such as 1%, got '1'"),
        ({}, {"kv_loss": "-1%"}, "kv_loss must be a share such as"),
        ({"kv": CANDIDATES[0]}, {"kv_loss": "1%"}, "kv_loss chooses the KV cache, and kv names one"),
        ({"kv_dir": "kept"}, {"kv_loss": "1%"}, "kv_dir keeps one: give one of the two"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    engine: dict[str, Any], own: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", make_rows([SHORT]))
    with pytest.raises(InputError, match=message):
        run(folder, source, tmp_path / "out.jsonl", engine, **own)
    assert not (tmp_path / "out.jsonl.journal").exists()


@pytest.mark.parametrize("kv", ["kivy", "kivi(k=5)", "infllm(blocks=0)", "snapkv + h2o", "snapkv"])
def test_a_cache_that_cannot_be_had_leaves_no_journal_in_the_way(kv: str, folder: Path, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", make_rows([SHORT])), tmp_path / "out.jsonl"
    with pytest.raises(InputError):
        run(folder, source, output, {"kv": kv, "kv_dir": str(tmp_path / "kept")})
    assert run(folder, source, output, {"kv": "kivi(k=4, v=4)"})["requests"] == 1
    assert run(folder, source, output, {"kv": " kivi( k=4,v=4 ) "})["requests"] == 1, "spaces make no other job"


@pytest.mark.parametrize(("rows", "own"), [([LONG] * 8, {"embed": True}), ([100_000] * 8, {})])
def test_a_job_without_answers_has_none_to_lose(
    rows: list[int], own: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", make_rows(rows))
    report = run(folder, source, tmp_path / "out.jsonl", kv_loss="5%", **own)
    assert report["requests"] == 8 and report["failed"] == (0 if own else 8)
    assert report["kv_loss"]["kv"] == "plain" and report["kv_loss"]["sample"] is None


def test_another_cache_is_another_job(folder: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", make_rows([LONG] * 4))
    run(folder, source, tmp_path / "out.jsonl", {"kv": CANDIDATES[0]})
    with pytest.raises(InputError, match=r'kv was "kivi.*" and is not set'):
        run(folder, source, tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="block_size was 32 and is 64"):
        run(folder, source, tmp_path / "out.jsonl", {"kv": CANDIDATES[0], "block_size": 64})
    run(folder, source, tmp_path / "budget.jsonl", kv_loss="5%")
    with pytest.raises(InputError, match=r"kv_loss was 0\.05 and is 0\.06"):
        run(folder, source, tmp_path / "budget.jsonl", kv_loss="6%")
    run(folder, source, tmp_path / "plain.jsonl")
    assert run(folder, source, tmp_path / "plain.jsonl", {"block_size": 64})["requests"] == 4, "no bit depends on it"


def test_the_cache_is_part_of_the_systems_name(folder: Path, tmp_path: Path) -> None:
    source, checkpoint = write_lines(tmp_path / "in.jsonl", make_rows([SHORT])), open_checkpoint(str(folder))

    def name(own: dict[str, Any], **changes: Any) -> str:
        settings = RunOptions(prompt="{{ text }}", **own)
        ask = read_ask(str(source), str(tmp_path / "o.jsonl"), options(folder, **changes), SamplingOptions(), settings)
        return name_system(make_fingerprint(ask, "hash", checkpoint))

    names = [name({}), name({}, kv=CANDIDATES[0]), name({}, kv=CANDIDATES[0], block_size=64), name({"kv_loss": "1%"})]
    assert len(set(names)) == 4 and name({}, block_size=64) == names[0]
    facts = json.loads(json.dumps({"kv": FULL, "block_size": 32}))
    assert name_system(facts) == name_system({}), "as a server knows it"


def test_a_tuned_block_size_is_for_the_full_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_tuned("model", "machine", "fp32", {"block_size": 64, "step_tokens": 512})
    plain = EngineOptions()
    assert apply_tuned(plain, "model", "machine", "fp32").block_size == 64
    found = apply_tuned(replace(plain, kv=CANDIDATES[0]), "model", "machine", "fp32")
    assert (found.block_size, found.step_tokens) == (32, 512)


def test_an_engine_changes_its_cache_only_when_empty(folder: Path) -> None:
    with LLM(**vars(options(folder))) as llm:
        (request,) = make_requests(llm, [LONG])
        llm.engine.add(request)
        with pytest.raises(ValueError, match="1 unfinished requests"):
            llm.use_kv(CANDIDATES[0], 32)
        assert llm.resolved["kv"] == FULL == llm.options.kv
        llm.engine.abort(request.id)
        llm.use_kv(CANDIDATES[0], 32)
        assert llm.resolved["kv"] == CANDIDATES[0] and llm.engine.cache.layout is llm.engine.state.ledger.layout
        assert llm.engine.counters.kv_budget_bytes <= 4 << 20
        assert len(llm.generate("the wheel turns", SamplingParams(max_tokens=3))[0].outputs[0].token_ids) == 3


def test_shares_are_said_in_percent() -> None:
    said = [format_share(share) for share in (0.01, 0.0312, 0.12345, 0.00045, 0.0, 1.0, -0.002)]
    assert said == ["1%", "3.1%", "12%", "0.04%", "0%", "100%", "-0.2%"]
