"""What `headrace bench steps` measures: against machines whose step times are known, and that its flags reach all."""

from __future__ import annotations

import json
import math
import random
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from jobs import batch_rows, engine_options, write_lines
from step_times import TIMES

from headrace.checkpoint import open_checkpoint
from headrace.cli import main
from headrace.core import InputError
from headrace.engine.loading import resolve_options
from headrace.llm import LLM
from headrace.meter.meter import Meter
from headrace.meter.operations import Piece
from headrace.meter.peaks import NoisyMachine
from headrace.meter.step_time import StepTime, interpolate, spell_command
from headrace.options import EngineOptions
from headrace.plan import fitting
from headrace.plan.fitting import confirm, fit_line, fit_parts, fit_wanted
from headrace.plan.prober import Probe, Prober

UNKNOWN = replace(TIMES, tokens=[(1, 0.0), (2, 0.0)], wanted=[(1, 0.0), (2, 0.0)], chunk=0.0, own=0.0, shared=0.0)


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's steps, and few of them."""
    monkeypatch.setattr(fitting, "TOKENS", (1, 2, 8, 64, 256))
    monkeypatch.setattr(fitting, "WANTED", (1, 4, 8))
    monkeypatch.setattr(fitting, "LONG", 256)


class LastStep(Meter):
    """A meter that also remembers what the engine told it of its last step."""

    pieces: Sequence[Piece] = ()

    def count(self, pieces: Sequence[Piece], began: float) -> None:
        super().count(pieces, began)
        self.pieces = pieces


class KnownMachine(Prober):
    """A real engine by the clock of a machine on which a step takes just what its pieces are said to."""

    def __init__(self, llm: LLM, times: StepTime) -> None:
        super().__init__(llm)
        self.times = times
        self.meter = llm.engine.meter = LastStep(llm.engine.meter.shape, None, llm.engine.meter.watch)

    def step(self) -> float:
        super().step()
        return self.times.predict(self.meter.pieces)


@pytest.mark.usefixtures("few_sizes")
@pytest.mark.parametrize(
    "kv",
    ["plain", "streaming(keep=0.25)", "infllm(topk=1, init=1, local=1)", "minicache(start=0, residual=32)"],
)
def test_what_is_fitted_is_what_the_machine_takes(kv: str, tiny_model: Path) -> None:
    """Also where a policy leaves a part of each context, reads a part of it, or bounds a prompt's chunks."""
    with LLM(**asdict(engine_options(tiny_model, kv=kv, kv_cache_bytes=32 << 20))) as llm:
        windows, sharing = llm.engine.model.config.windows, llm.engine.state.ledger.prefix_cache
        truth = replace(TIMES, windows=windows, wanted=[(1, 0.0025), (128, 0.066)])
        found = fit_parts(KnownMachine(llm, truth), replace(UNKNOWN, windows=windows), lambda text: None)
        assert llm.engine.unfinished == 0
    assert found.chunk == pytest.approx(truth.chunk, rel=0.01) and found.own == pytest.approx(truth.own, rel=0.01)
    assert found.shared == pytest.approx(truth.shared if sharing else truth.own, rel=0.01)
    for count in (1, 8, 64, 256):
        assert interpolate(found.tokens, count) == pytest.approx(interpolate(truth.tokens, count), rel=0.01)
    for count in (1, 100):
        assert interpolate(found.wanted, count) == pytest.approx(interpolate(truth.wanted, count), rel=0.02)


@pytest.mark.usefixtures("few_sizes")
def test_a_machine_that_has_become_slower_does_not_make_choosing_dear(tiny_model: Path) -> None:
    with LLM(**asdict(engine_options(tiny_model))) as llm:
        before = replace(TIMES, windows=llm.engine.model.config.windows)
        found = fit_wanted(KnownMachine(llm, before.scale(1.4)), before, lambda text: None)
    for count in (1, 8):
        assert interpolate(found, count) == pytest.approx(1.4 * interpolate(before.wanted, count), rel=0.02)


@pytest.mark.usefixtures("few_sizes")
def test_long_steps_that_scatter_are_refused(tiny_model: Path) -> None:
    with LLM(**asdict(engine_options(tiny_model))) as llm:
        machine = KnownMachine(llm, replace(TIMES, windows=llm.engine.model.config.windows))
        slow, steady = [Probe(each, []) for each in (1.0, 1.3)], [Probe(each, []) for each in (1.3, 1.0, 1.1)]
        assert confirm(machine, 8, steady).seconds == 1.0
        # Neither is believed, so it is measured again until two agree: the machine is far faster than both.
        assert confirm(machine, 8, slow).seconds < 0.5 and len(slow) == 4
        wild = [Probe(float(each), []) for each in (1, 2, 4, 8, 16)]
        with pytest.raises(NoisyMachine, match="chunks of 8 tokens: none of 5 measurements is within 20% of the least"):
            confirm(machine, 8, wild)


def test_noise_leaves_a_line() -> None:
    rows = (1, 2, 4, 8, 16, 32, 64, 128)
    chunks = [0.011 + 0.0014 * count for count in rows]
    misses = []
    for seed in range(100):
        draw = random.Random(seed)
        less = [seconds * draw.gauss(1, 0.05) for seconds in chunks]
        more = [(s + 0.002 + 0.0004 * count) * draw.gauss(1, 0.05) for count, s in zip(rows, chunks, strict=True)]
        gaps = [high - low for high, low in zip(more, less, strict=True)]
        first, each = fit_line(rows, gaps, more)
        assert first >= 0 and each >= 0
        misses.append(abs(first + 100 * each - 0.042) / (0.011 + 0.14 + 0.042))
    # A single difference misses a step's time by 7 % where both of its measurements miss by 5 %.
    assert sum(misses) / 100 < 0.035 and max(misses) < 0.11


def test_lines_are_the_best_of_those_that_may_be() -> None:
    assert fit_line([1, 2, 4], [0.005, 0.007, 0.011], [0.1, 0.1, 0.1]) == pytest.approx((0.003, 0.002))
    assert fit_line([1, 3], [-0.001, 0.01], [0.1, 0.1]) == pytest.approx((0.0, (3 * 0.01 - 0.001) / 10))
    assert fit_line([1, 3], [0.009, 0.003], [0.1, 0.1]) == pytest.approx((0.006, 0.0))
    assert fit_line([1, 3], [-0.009, -0.003], [0.1, 0.1]) == (0.0, 0.0)
    # The last is a step ten times as long, and may miss by ten times as much.
    assert fit_line([1, 2, 3], [0.001, 0.002, 0.008], [0.01, 0.01, 1.0])[1] == pytest.approx(0.001, rel=0.01)
    first, each = fit_line([1], [0.004], [0.1])
    assert first + each == pytest.approx(0.004)


def test_of_a_shared_prefix_no_more_counts_than_is_read() -> None:
    assert TIMES.attend([Piece(48, 1, 1, True, shared=160)]) == pytest.approx(
        2 * (TIMES.own * 1 + TIMES.shared * 48) + TIMES.own * 8
    )


@pytest.fixture
def quick_measuring(few_sizes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measurements of a cache folder of their own; the machine may be busy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("headrace.plan.prober.MOST_SCATTER", math.inf)
    monkeypatch.setattr(fitting, "MOST_SCATTER", math.inf)
    monkeypatch.setattr(fitting, "MOST_ERROR", math.inf)
    monkeypatch.setattr(fitting, "PAIR_ROUNDS", 1)
    yield


@pytest.mark.usefixtures("quick_measuring")
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_step_times_that_cannot_be_kept_are_shown(
    form: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # What is written there finds no room, as on a full disk.
    (tmp_path / "cache" / "headrace").mkdir(parents=True)
    part = tmp_path / "cache" / "headrace" / "step_times.json.part"
    part.symlink_to("/dev/full")
    command = ["bench", "steps", "--model", str(tiny_model), "--precision", "fp32", "--threads", "1", *form]
    assert main(command) == 3
    printed = capsys.readouterr()
    assert "kept in" not in printed.out and ("; not kept\n" in printed.out) == (not form)
    assert json.loads(printed.out)["tokens"] if form else "a small pile was foreseen" in printed.out
    assert printed.err.startswith(f"headrace: error: the result cannot be kept in {part.with_suffix('')}: No space")
    assert printed.err.count("\n") == 1
    part.unlink()
    assert main(command) == 0 and part.with_suffix("").exists()


def test_too_little_kv_memory_is_said(few_sizes: None, tiny_model: Path) -> None:
    with LLM(**asdict(engine_options(tiny_model, kv_cache_bytes=8192 * 20))) as llm:
        prober = KnownMachine(llm, TIMES)
        with pytest.raises(InputError, match="the KV memory is too small to measure steps of 8 sequences"):
            prober.time_decode(prober.draw_prompts(8, 64))


def test_advice_names_what_differs_from_the_defaults() -> None:
    assert spell_command(EngineOptions()) == "headrace bench steps"
    # What changes no step's time is left out.
    options = EngineOptions(kv="kivi(k=4, v=4)", block_size=64, tuned=False, schedule="fcfs", kv_cache_bytes=1 << 30)
    assert spell_command(options) == "headrace bench steps --kv 'kivi(k=4, v=4)' --block-size 64 --no-tuned"
    options = EngineOptions(model="a model", precision="int8", kernels="reference", threads=3, instruction_set="avx2")
    flags = "--model 'a model' --precision int8 --kernels reference --instruction-set avx2 --threads 3"
    assert spell_command(options) == f"headrace bench steps {flags}"


@pytest.mark.usefixtures("quick_measuring")
@pytest.mark.parametrize("changes", [{"kv": "streaming(keep=0.5)"}, {"kernels": "reference", "tuned": False}])
def test_who_follows_the_advice_gets_a_forecast(
    changes: dict[str, Any], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = engine_options(tiny_model, block_size=64, step_seconds=1.0, **changes)
    checkpoint = open_checkpoint(str(tiny_model))
    with pytest.raises(InputError, match="headrace bench steps") as refused:
        resolve_options(options, checkpoint)
    asked = {**changes, "block_size": 64}
    source = write_lines(tmp_path / "in.jsonl", batch_rows(3))
    plan = ["plan", str(source), "--model", str(tiny_model), "--precision", "fp32", "--threads", "1", "--json"]
    for name, value in asked.items():
        flag = name.replace("_", "-")
        plan += [f"--{flag}", str(value)] if value is not False else [f"--no-{flag}"]
    assert main(plan) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["seconds"] is None and said["measure"] == str(refused.value).split("`")[1]
    program, *command = shlex.split(said["measure"])
    assert program == "headrace" and main(command) == 0
    assert resolve_options(options, checkpoint).options.step_tokens >= 32
    capsys.readouterr()
    assert main(plan) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["seconds"] > 0 and said["measure"] is None
