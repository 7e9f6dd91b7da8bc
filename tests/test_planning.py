"""The simulator against the engine, step by step; the cost model; windows; what `headrace plan` says of a pile."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import asdict, replace
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from jobs import batch_rows, engine_options, write_lines
from schedule_driver import Driver, make_state
from step_times import TIMES

import headrace.engine.loading as loading
from headrace.cli import main
from headrace.core import Constraint, InputError, Request, RowError, SamplingParams, StepPlan
from headrace.engine.planner import Planner
from headrace.job.batch_rows import BatchDrafter
from headrace.job.feed import Feed
from headrace.job.foresight import foresee
from headrace.job.inlet import EngineInlet
from headrace.job.intake import read_ask
from headrace.job.journal import Journal
from headrace.job.pile import Expectation, make_pile
from headrace.job.planning import list_threads, plan_job
from headrace.job.run import run_job
from headrace.job.sources import JsonLines
from headrace.llm import LLM
from headrace.meter.operations import Piece
from headrace.meter.peaks import NoisyMachine
from headrace.meter.step_time import TILE, StepTime, describe_setting, interpolate, load_step_time, save_step_time
from headrace.options import EngineOptions, RunOptions, SamplingOptions
from headrace.plan.forecast import LEAST_ERROR, forecast
from headrace.plan.page import draw_forecast
from headrace.plan.prober import Prober, settle
from headrace.plan.simulator import Memory, Simulator, Task
from headrace.plan.words import format_forecast
from headrace.schedule.choice import SCHEDULES
from headrace.schedule.planned import Planned
from headrace.schedule.window import BIAS_BYTES, GRAMMAR_TIMES, Held, Window, count_bytes


def make_requests(count: int) -> list[Request]:
    """Rows that share prefixes, of several kinds; some have two continuations, which go on to their limit.

    Those are so hot that they differ: of equal outputs, which no simulator foresees, the cache keeps blocks once.
    """
    draw = random.Random(0)
    roots = [[draw.randrange(3, 300) for _ in range(40)] for _ in range(4)]
    found = []
    for number in range(count):
        own = [draw.randrange(3, 300) for _ in range(draw.randrange(1, 30))]
        n = draw.choice([1, 1, 2])
        params = SamplingParams(n=n, max_tokens=draw.choice([8, 24]), temperature=50.0 * (n > 1), ignore_eos=n > 1)
        found.append(Request(str(number), tuple(draw.choice(roots)[: draw.choice([16, 40])] + own), params))
    return found


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize(("num_blocks", "seconds"), [(24, None), (400, None), (400, 0.08)])
def test_simulated_steps_are_the_engines(
    name: Any, num_blocks: int, seconds: float | None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = replace(TIMES, chunk=2e-5, own=2e-5, shared=1e-5)
    monkeypatch.setattr(loading, "load_step_time", lambda setting: times)
    plans: list[StepPlan] = []
    simulated: list[StepPlan] = []
    plan = Planner.plan

    def record(*arguments: Any) -> StepPlan:
        plans.append(plan(*arguments))
        return plans[-1]

    monkeypatch.setattr(Planner, "plan", record)
    requests = make_requests(60)
    changes = {"schedule": name, "step_tokens": 96, "max_sequences": 12, "step_seconds": seconds, "plan_ahead": "on"}
    changes["kv_cache_bytes"] = num_blocks * 8192
    options = engine_options(tiny_model, **changes)
    with LLM(**asdict(options)) as llm:
        cache, counters = llm.engine.cache, llm.engine.counters
        memory = Memory.of_engine(llm.engine)
        assert cache.num_blocks == num_blocks
        answers = llm.generate([each.prompt_token_ids for each in requests], [each.params for each in requests])
    tasks = [Task(each, len(answer.outputs[0].token_ids)) for each, answer in zip(requests, answers, strict=True)]
    found = Simulator(llm.options, memory, times, simulated.append).run(tasks)
    assert simulated == plans and len(plans) > 30
    # The last token of a prompt, where that is left alone, is one of those that go on in any case.
    late = [prompt for _, took, prompt, _, _ in found.timeline if took > (seconds or math.inf)]
    assert max(late, default=0) < TILE + 12
    assert (found.steps, found.preemptions) == (counters.steps, counters.preemptions)
    assert found.cached_prompt_tokens == counters.cached_prompt_tokens
    assert found.output_tokens == counters.output_tokens
    assert found.peak_blocks * cache.layout.block_bytes == counters.kv_peak_bytes
    assert found.tasks == len(requests) and found.left == []


def test_a_steps_time_is_that_of_its_tokens_rows_and_pairs() -> None:
    assert interpolate(TIMES.tokens, 0) == 0.0 and interpolate(TIMES.tokens, 1) == 0.01
    assert interpolate(TIMES.tokens, 544) == pytest.approx((0.05 + 0.5) / 2)
    assert interpolate(TIMES.tokens, 1984) == pytest.approx(0.95)
    chunk = TIMES.predict([Piece(100, 64, 1, False)])
    # Two layers see all, one sees a window of 8.
    pairs = 2 * (64 * 100 + 64 * 65 // 2) + 64 * 8
    assert chunk == pytest.approx(0.05 + 0.001 + 1e-7 * pairs)
    assert TIMES.scale(2).predict([Piece(100, 64, 1, False)]) == pytest.approx(2 * chunk)
    decode = TIMES.predict([Piece(100, 1, 1, True, shared=60)])
    assert decode == pytest.approx(0.01 + 0.001 + 4e-7 * (2 * 41 + 8) + 1e-7 * 2 * 60)


def test_step_times_are_kept_by_setting(tmp_path: Path) -> None:
    path = tmp_path / "step_times.json"
    assert load_step_time("a test", path) is None
    save_step_time(TIMES, path)
    save_step_time(StepTime(**{**asdict(TIMES), "setting": "another", "chunk": 1.0}), path)
    assert load_step_time("a test", path) == TIMES and load_step_time("none", path) is None
    resolved = asdict(EngineOptions()) | {"threads": 2}
    setting = describe_setting("0" * 64, "a processor", resolved)
    assert setting.startswith(f"{'0' * 16} a processor precision=auto ") and " threads=2 " in setting
    assert setting.endswith(f" headrace={version('headrace')} torch={version('torch')}"), "others take another time"
    path.write_text("{ half of it")
    assert load_step_time("a test", path) is None


def test_a_probe_computes_the_steps_it_says(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.plan.prober.MOST_SCATTER", math.inf)  # the machine may be busy
    with LLM(**asdict(engine_options(tiny_model, kv_cache_bytes=32 << 20))) as llm:
        prober, counters = Prober(llm), llm.engine.counters
        prober.time_chunks(96, 1)
        assert (counters.steps, counters.computed_prompt_tokens, counters.output_tokens) == (1, 96, 0)
        prober.time_chunks(32, 4)
        assert (counters.steps, counters.computed_prompt_tokens) == (5, 96 + 128)
        prober.time_decode(prober.draw_prompts(4, 200, shared=True))
        assert counters.cached_prompt_tokens == 3 * 192 and llm.engine.meter.timeline[-1][2:] == [0, 4, 4]
        assert llm.engine.unfinished == 0 and llm.engine.state.limits == prober.limits


def test_times_that_scatter_are_refused() -> None:
    steady, wild, slow = iter([0.1, 0.105] * 20), iter([0.01, 0.03, 0.09] * 20), iter([1.0, 9.0])
    assert settle(lambda: next(steady), "steps") == [0.1, 0.105, 0.1]
    assert settle(lambda: next(slow), "steps") == [1.0], "a long step averages what disturbs it"
    with pytest.raises(NoisyMachine, match="steps: 3 measurements scatter by"):
        settle(lambda: next(wild), "steps")


def make_tasks(count: int, output: int = 6) -> list[Task]:
    draw = random.Random(1)
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    return [Task(Request(str(n), tuple(draw.randrange(999) for _ in range(20)), params), output) for n in range(count)]


def test_what_is_not_simulated_goes_on_alike() -> None:
    memory = Memory(make_state([None] * 3, 1, 16).ledger.layout, 500, 1024)
    options = EngineOptions(step_tokens=64, max_sequences=16)
    tasks = make_tasks(400)
    whole, part = (forecast(tasks, options, memory, TIMES, most_steps=most) for most in (None, 60))
    assert whole.simulated == 1.0 and 0.1 < part.simulated < 0.9 and whole.seconds is not None
    assert part.seconds == pytest.approx(whole.seconds, rel=0.1) and part.steps == pytest.approx(whole.steps, rel=0.1)
    # Even where no row has ended yet, what was computed of them counts.
    early = forecast(make_tasks(16, 300), options, memory, TIMES, most_steps=40)
    late = forecast(make_tasks(16, 300), options, memory, TIMES)
    assert early.seconds == pytest.approx(late.seconds, rel=0.25) and early.planned_tokens == late.planned_tokens
    assert whole.planned_tokens == whole.arrival_tokens == 400 * 20, "less than a block is not shared"
    assert whole.error == max(LEAST_ERROR, 2 * TIMES.error)
    unknown = forecast(tasks, options, memory, None)
    assert unknown.seconds is None and unknown.steps == whole.steps


def test_where_nothing_is_shared_no_order_saves_anything() -> None:
    layout = make_state([None] * 3, 1, 16).ledger.layout
    tasks = [Task(replace(each.request, prompt_token_ids=[7] * 100), 6) for each in make_tasks(40)]
    sharing, alone = Memory(layout, 500, 1024), Memory(replace(layout, shares_prefixes=False), 500, 1024)
    options = EngineOptions(step_tokens=64, max_sequences=16)
    for memory, prefix_cache in ((alone, True), (sharing, False)):
        found = forecast(tasks, replace(options, prefix_cache=prefix_cache), memory, None)
        assert found.planned_tokens == found.arrival_tokens == found.optimum_tokens == 4000
    assert forecast(tasks, options, sharing, None).optimum_tokens == 100


def test_only_what_is_planned_counts_windows(tiny_model: Path, tmp_path: Path) -> None:
    memory = Memory(make_state([None] * 3, 1, 16).ledger.layout, 500, 1024)
    source = write_lines(tmp_path / "in.jsonl", batch_rows(40))
    for schedule, windows in (("planned", 1), ("fcfs", 0), ("random", 0)):
        options = EngineOptions(step_tokens=64, max_sequences=4, schedule=schedule)  # type: ignore[arg-type]
        assert forecast(make_tasks(400), options, memory, TIMES).windows == windows
        engine, sampling = engine_options(tiny_model, schedule=schedule, max_sequences=2), SamplingOptions(max_tokens=2)
        report = run_job(str(source), str(tmp_path / f"{schedule}.jsonl"), engine, sampling, RunOptions(quiet=True))
        assert report["windows"] == windows
    small = EngineOptions(step_tokens=64, max_sequences=4, window_bytes=2**20)
    assert forecast(make_tasks(1000), small, memory, None).windows == 4


def test_impossible_alternatives_are_said_beside_the_others(tiny_model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", batch_rows(3))
    ask = ask_of(tiny_model, source)
    one_block = 2 * 2 * 16 * 2 * 16 * 4
    small = replace(ask, engine=replace(ask.engine, kv_cache_bytes=8 * one_block))
    said = {each["name"]: each["impossible"] for each in plan_job(small, None, True, lambda text: None)["compared"]}
    assert said["KV memory / 4"] is None and "holds no KV block" in said["KV memory / 16"]


def measure_tail(schedule: Any) -> float:
    """The share of a simulated run's time in which its last 5 % of rows end; outputs of 4 to 400 tokens."""
    draw, tasks, ends = random.Random(2), [], []
    for number in range(600):
        prompt, output = tuple(draw.randrange(999) for _ in range(draw.randrange(8, 200))), draw.randrange(4, 400)
        tasks.append(Task(Request(str(number), prompt, SamplingParams(max_tokens=output, ignore_eos=True)), output))
    memory = Memory(make_state([None] * 3, 1, 16).ledger.layout, 4000, 1024)

    def watch(plan: StepPlan) -> None:
        ends.extend([simulator.found.seconds] * (simulator.found.tasks - len(ends)))

    simulator = Simulator(EngineOptions(schedule=schedule, max_sequences=32, step_tokens=256), memory, TIMES, watch)
    found = simulator.run(tasks)
    watch(StepPlan())
    return 1 - ends[569] / found.seconds


def test_no_long_row_runs_alone_at_the_end() -> None:
    tails = {name: measure_tail(name) for name in SCHEDULES}
    assert tails["planned"] <= 0.10 and tails["random"] > 1.5 * tails["planned"], tails


def test_tasks_that_can_never_run_are_refused() -> None:
    memory = Memory(make_state([None], 1, 16).ledger.layout, 4, 1024)
    found = Simulator(EngineOptions(), memory, None).run([*make_tasks(2), *make_tasks(1, 90)])
    assert (found.refused, found.tasks) == (1, 2)


def test_the_simulator_refuses_what_the_engine_refuses(tiny_model: Path) -> None:
    """Not by what a row will say, but by the most that it may."""
    draw, tasks, refused = random.Random(4), [], set()
    for number in range(300):
        params = SamplingParams(max_tokens=draw.choice([1, draw.randrange(1, 400), draw.randrange(400, 2000)]))
        prompt = tuple(draw.randrange(300) for _ in range(draw.choice([0, draw.randrange(1, 300), 1020 + number % 9])))
        request = Request(str(number), prompt, params, score=number % 5 == 0)
        tasks.append(Task(request, draw.randrange(1, 9) * request.generates))
    for kv, blocks in (("plain", 20), ("plain", 200), ("streaming(keep=64, every=32)", 10)):
        options = engine_options(tiny_model, kv=kv, kv_cache_bytes=blocks * 8192)
        with LLM(**asdict(options)) as llm:
            memory, refused = Memory.of_engine(llm.engine), set()
            for task in tasks:
                try:
                    llm.engine.add(task.request)
                    llm.engine.abort(task.request.id)
                except RowError:
                    refused.add(task.request.id)
        assert {task.request.id for task in tasks if memory.refuses(task.request)} == refused
        found = Simulator(options, memory, None).run(tasks)
        assert found.refused == len(refused) and found.tasks == 300 - len(refused) and 20 < found.tasks < 280


def test_no_output_goes_beyond_max_tokens_or_the_context() -> None:
    """What the engine lets in can always end in its memory."""
    memory = Memory(make_state([None], 1, 16).ledger.layout, 4, 64)
    tasks = [Task(make_tasks(1, 500)[0].request, 500), Task(make_tasks(2, 9)[1].request, 500)]
    found = Simulator(EngineOptions(), memory, None).run(tasks, 2000)
    assert (found.refused, found.tasks, found.output_tokens) == (0, 2, 44 + 9)


@pytest.mark.parametrize("most_steps", [None, 60])
def test_what_is_refused_counts_for_nothing(most_steps: int | None) -> None:
    memory = Memory(make_state([None], 1, 16).ledger.layout, 100, 4096)
    options, tasks = EngineOptions(step_tokens=64, max_sequences=16), make_tasks(400)
    long = [Task(replace(each.request, id=f"long {each.request.id}"), 2) for each in make_tasks(100, 3000)]
    alone, beside = (forecast(each, options, memory, TIMES, most_steps=most_steps) for each in (tasks, tasks + long))
    assert replace(beside, requests=400, refused=0) == alone
    assert (beside.requests, beside.refused) == (500, 100) and (alone.simulated < 1) == (most_steps is not None)


def test_threads_are_compared_up_to_the_number_of_cores() -> None:
    assert [list_threads(cores) for cores in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_window_is_filled_at_once_and_again_when_few_are_left() -> None:
    driver = Driver(make_state([None], 500, 16, max_sequences=2), schedule=Planned())
    driver.state.window_bytes = 2**20
    window, row = Window(driver.state, driver.schedule), count_bytes(100)
    rows = 0
    while window.wants(rows * row):
        driver.add([1] * 100, 1)
        rows += 1
    assert rows == -(-(2**20) // row) and window.filled == 1
    while len(driver.state.waiting) >= 4:
        assert not window.wants(len(driver.state.waiting) * row)
        driver.state.waiting.popleft()
    assert window.wants(3 * row) and not window.wants(2**20)
    driver.state.waiting.clear()
    assert not window.wants(2**20), "rows that wait for an equal one's answer are in no queue"
    driver.state.sequences.clear()
    assert window.wants(2**20), "one row may be larger than the memory for a window"


def test_what_is_held_is_given_back_and_a_grammar_counts_once() -> None:
    def ask(name: str, words: str | None = None, **more: Any) -> Request:
        constraint = None if words is None else Constraint("choice", words)
        return Request(name, [5] * 100, SamplingParams(constraint=constraint, **more))

    held, plain, grammar = Held(), count_bytes(100), GRAMMAR_TIMES * len('["a", "b"]')
    sizes = []
    requests = [ask("1"), ask("2", '["a", "b"]'), ask("3", '["a", "b"]'), ask("4", n=3), ask("5", logit_bias={7: 1.0})]
    for request in requests:
        before = held.bytes
        held.take(request, beside=10)
        sizes.append(held.bytes - before - 10)
    assert sizes == [plain, plain + grammar, plain, count_bytes(100, 3), plain + BIAS_BYTES]
    for request in requests:
        held.give_back(request, beside=10)
    assert held.bytes == 0


def test_what_outputs_are_taken_to_be(tiny_model: Path) -> None:
    with LLM(**asdict(engine_options(tiny_model))) as llm:
        tokenizer = llm.tokenizer
    exact = SamplingParams(max_tokens=9, ignore_eos=True)
    assert Expectation(tokenizer).look(Request("a", (1,), exact)) == (9, True)
    assert Expectation(tokenizer).look(Request("a", (1,), SamplingParams(max_tokens=9))) == (9, False)
    assert Expectation(tokenizer, 4).look(Request("a", (1,), SamplingParams(max_tokens=9))) == (4, False)
    for sooner in ({"stop_token_ids": (5,)}, {"stop": ("a",)}):
        assert Expectation(tokenizer).look(Request("a", (1,), replace(exact, **sooner))) == (9, False)
    # Words of as many tokens are not so for sure: the model may spell them in more.
    for choices, expected in (
        ('["A", "B"]', (1, True)),
        ('["wheel", "wheel"]', (2, False)),
        ('["A", "é"]', (2, False)),
    ):
        params = SamplingParams(max_tokens=9, constraint=Constraint("choice", choices))
        assert Expectation(tokenizer).look(Request("a", (1,), params)) == expected
    assert make_pile([Request("a", (1,), exact)], Expectation(tokenizer)).outputs_known


def ask_of(model: Path, source: Path, **run: Any) -> Any:
    sampling = SamplingOptions(max_tokens=5, ignore_eos=True)
    return read_ask(str(source), "unused.jsonl", engine_options(model), sampling, RunOptions(**run))


def test_a_plan_says_what_the_run_then_does(tiny_model: Path, tmp_path: Path) -> None:
    rows = [*batch_rows(30), *batch_rows(2), {"custom_id": "broken"}]
    rows.append({**batch_rows(1)[0], "custom_id": "equal"})
    source = write_lines(tmp_path / "in.jsonl", rows)
    said = plan_job(ask_of(tiny_model, source), None, True, lambda text: None)
    sampling = SamplingOptions(max_tokens=5, ignore_eos=True)
    quiet = RunOptions(quiet=True)
    report = run_job(str(source), str(tmp_path / "out.jsonl"), engine_options(tiny_model), sampling, quiet)
    assert (said["rows"], said["requests"], said["equal"], said["failed"]) == (34, 30, 1, 3)
    assert said["outputs_known"] and said["seconds"] is None
    counted = ("steps", "preemptions", "prompt_tokens", "output_tokens", "kv_peak_bytes", "kv_budget_bytes")
    assert {name: said[name] for name in counted} == {name: report[name] for name in counted}
    assert said["planned_tokens"] == report["computed_prompt_tokens"]
    compared = {each["name"]: each for each in said["compared"]}
    assert compared.keys() >= {"precision bf16", "threads 1", "KV memory / 4"}
    assert compared["precision bf16"]["measure"].endswith(" --precision bf16 --threads 1 --block-size 16")


def test_a_plan_says_that_it_foresees_no_budget_for_loss(tiny_model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", batch_rows(3))
    plain, exact, lossy = (
        plan_job(ask_of(tiny_model, source, kv_loss=budget), None, False, lambda text: None)
        for budget in (None, "0%", "1.5%")
    )
    assert plain["kv_reason"] is None and "KV loss" not in format_forecast(plain)
    assert exact["kv_reason"] is None, "without a loss it is the full cache"
    assert "\nKV loss    the full cache is foreseen: " in format_forecast(lossy)
    assert lossy["kv_reason"].endswith("which smaller one loses at most 1.5%")


def test_of_rows_that_are_all_refused_there_is_nothing_to_draw(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.plan.site.load_step_time", lambda setting: TIMES)
    ask = ask_of(tiny_model, write_lines(tmp_path / "in.jsonl", batch_rows(3)))
    said = plan_job(replace(ask, engine=replace(ask.engine, kv_cache_bytes=8192)), None, False, lambda text: None)
    assert said["refused"] == 3 and said["seconds"] == 0
    with pytest.raises(InputError, match="there is nothing to draw"):
        draw_forecast(said)


def test_what_has_passed_counts_once_however_many_rows_follow(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.job.foresight.load_step_time", lambda setting: TIMES)
    source = JsonLines(write_lines(tmp_path / "in.jsonl", batch_rows(20)))
    with LLM(**asdict(engine_options(tiny_model))) as llm:
        drafter = BatchDrafter(llm.tokenizer, SamplingParams(max_tokens=5), "error", str(tiny_model))
        feed = Feed(source.rows(), drafter, EngineInlet(llm.engine), llm.tokenizer, Journal(tmp_path / "journal"))
        feed.top_up()
        once, soon, late = (foresee(llm, feed, *each) for each in ((20, 0.0), (60, 0.0), (60, 100.0)))
    assert once["rows_seen"] == 20 and soon["seconds"] == pytest.approx(3 * once["seconds"])
    assert late == soon | {"seconds": pytest.approx(soon["seconds"] + 100)}


def test_a_run_says_first_what_it_will_take(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.job.foresight.load_step_time", lambda setting: TIMES)
    source = write_lines(tmp_path / "in.jsonl", batch_rows(20))
    sampling = SamplingOptions(max_tokens=5, ignore_eos=True)
    options = engine_options(tiny_model)
    report = run_job(str(source), str(tmp_path / "out.jsonl"), options, sampling, RunOptions(quiet=True))
    found = report["forecast"]
    assert found["outputs_known"] and found["steps"] == report["steps"] and found["rows"] == 20
    assert found["missed"] == pytest.approx(report["wall_s"] / found["seconds"] - 1, abs=0.01)


def test_the_command(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "in.jsonl", batch_rows(3))
    flags = ["--model", str(tiny_model), "--precision", "fp32", "--kv-cache-bytes", "4MiB"]
    assert main(["plan", str(source), *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("rows       3: 3 to compute\n")
    assert f"`headrace bench steps --model {tiny_model} --precision fp32`" in printed
    assert main(["plan", str(source), *flags, "--compare"]) == 0
    wanted = f"\nnot measured yet: headrace bench steps --model {tiny_model} --precision int8\n"
    assert wanted in capsys.readouterr().out
    assert main(["plan", str(source), *flags, "--json", "--expect-output", "7"]) == 0
    assert json.loads(capsys.readouterr().out)["output_tokens"] == 21
    with pytest.raises(InputError, match="name one instead of -"):
        plan_job(ask_of(tiny_model, Path("-")), None, False, lambda text: None)


def test_the_command_tells_energy_and_cost_and_draws_the_time(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("headrace.plan.site.load_step_time", lambda setting: replace(TIMES, watts=250.0))
    source, page = write_lines(tmp_path / "<in>.jsonl", batch_rows(20)), tmp_path / "forecast.html"
    flags = ["--model", str(tiny_model), "--precision", "fp32", "--kv-cache-bytes", "4MiB", "--max-tokens", "5"]
    command = ["plan", str(source), *flags, "--price-per-hour", "36"]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["seconds"] == pytest.approx(sum(seconds for _, seconds, *_ in said["timeline"])) and said["seconds"] > 0
    assert said["cost"] == pytest.approx(36 * said["seconds"] / 3600)
    assert said["energy_j"] == pytest.approx(250 * said["seconds"])
    assert main([*command, "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert f"\ncost       {said['cost']:.4f}\nenergy     {said['energy_j']:,.0f} J\n" in printed
    html = page.read_text()
    assert html.count("<svg") == 1 and "Tokens a second and sequences in a step, as foreseen" in html
    assert escape(printed.strip()) in html and "&lt;in&gt;.jsonl" in html and "<in>" not in html
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html), "the page must open without a network"


def test_the_command_draws_nothing_where_no_time_is_known(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, page = write_lines(tmp_path / "in.jsonl", batch_rows(3)), tmp_path / "forecast.html"
    command = ["plan", str(source), "--model", str(tiny_model), "--precision", "fp32", "--price-per-hour", "36"]
    assert main([*command, "--html", str(page)]) == 2 and not page.exists()
    said = capsys.readouterr()
    assert "there is no time to draw" in said.err and "\ncost " not in said.out and "\nenergy " not in said.out
