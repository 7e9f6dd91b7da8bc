"""What `headrace tune` finds, where it is kept, and when it is used; the token budget that a time for a step allows."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from jobs import engine_options
from step_times import TIMES

from headrace.checkpoint import open_checkpoint
from headrace.core import InputError
from headrace.engine.loading import resolve_options
from headrace.engine.tuned import apply_tuned, load_tuned, save_tuned
from headrace.llm import LLM
from headrace.options import EngineOptions
from headrace.plan import site, tuning
from headrace.plan.tuning import LEAST_GAIN, MAX_SEQUENCES, STEP_TOKENS, rank_simulated, run_pile, tune


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_what_was_found_replaces_defaults_and_nothing_else(tiny_model: Path) -> None:
    checkpoint, plain = open_checkpoint(str(tiny_model)), EngineOptions(model=str(tiny_model), precision="fp32")
    machine = resolve_options(plain, checkpoint).machine
    found = {"step_tokens": 512, "max_sequences": 64, "block_size": 16}
    save_tuned(checkpoint.hash(), machine, "fp32", found)
    assert load_tuned(checkpoint.hash(), machine, "fp32") == found
    assert load_tuned(checkpoint.hash(), machine, "bf16") == load_tuned("another", machine, "fp32") == {}
    chosen = resolve_options(replace(plain, max_sequences=7), checkpoint).options
    assert (chosen.step_tokens, chosen.max_sequences, chosen.block_size) == (512, 7, 16)
    assert resolve_options(replace(plain, tuned=False), checkpoint).options.step_tokens == plain.step_tokens
    save_tuned(checkpoint.hash(), machine, "fp32", found | {"threads": 1})
    reasons = [resolve_options(each, checkpoint).threads_reason for each in (plain, replace(plain, threads=1))]
    assert reasons == ["tuned", "asked for"]
    assert resolve_options(replace(plain, tuned=False), checkpoint).threads_reason == "all cores"
    with LLM(**asdict(replace(plain, kv_cache_bytes=4 << 20))) as llm:
        assert llm.engine.state.limits.step_tokens == 512 == llm.resolved["step_tokens"] == llm.options.step_tokens
        assert llm.engine.cache.layout.block_size == 16


def test_what_cannot_be_read_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    options = EngineOptions(model=str(tiny_model))
    path = save_tuned("model", "machine", "fp32", {"precision": 3})
    assert apply_tuned(options, "model", "machine", "fp32") == options
    path.write_text("[1, 2")
    assert apply_tuned(options, "model", "machine", "fp32") == options
    path.write_text("[1, 2]")
    assert apply_tuned(options, "model", "machine", "fp32") == options


def test_simulations_choose_the_finalists(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, checkpoint = engine_options(tiny_model, kv_cache_bytes=64 << 20), open_checkpoint(str(tiny_model))
    with pytest.raises(InputError, match="headrace bench steps"):
        rank_simulated(options, checkpoint, lambda text: None)
    # A step costs so much by itself that few large ones are best.
    heavy = replace(TIMES, tokens=[(1, 1.0), (4096, 1.1)], wanted=[(1, 0.0), (4096, 0.0)])
    monkeypatch.setattr(site, "load_step_time", lambda setting: heavy)
    said: list[str] = []
    best = rank_simulated(options, checkpoint, said.append)[0]
    assert best["step_tokens"] >= 1024 and best["max_sequences"] == 512
    assert len(said) == len(STEP_TOKENS) * len(MAX_SEQUENCES)


@pytest.mark.parametrize("gain", [LEAST_GAIN / 2, LEAST_GAIN * 2])
def test_only_what_is_clearly_faster_is_kept(gain: float, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "load_step_time", lambda setting: TIMES)

    def measure(settings: dict[str, Any]) -> float:
        return 1.0 - gain if settings["block_size"] == 64 else 1.0

    monkeypatch.setattr(tuning, "run_pile", measure)
    found = tune(engine_options(tiny_model, threads=None), open_checkpoint(str(tiny_model)), lambda text: None)
    assert found.trials[0].changes == {} and found.trials[0].seconds == 1.0
    assert found.kept.get("block_size") == (64 if gain > LEAST_GAIN else None)


def test_the_pile_runs(tiny_model: Path) -> None:
    assert run_pile(asdict(engine_options(tiny_model))) > 0


def test_a_time_for_a_step_bounds_its_tokens(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TIMES.most_tokens(0.0, 1024) == 32 and TIMES.most_tokens(0.065, 1024) == 64
    assert (
        500 < TIMES.most_tokens(0.4, 1024) < 800
        and TIMES.most_tokens(9.0, 1024) == 1024
        and TIMES.most_tokens(9.0, 20) == 20
    )
    options, checkpoint = engine_options(tiny_model, step_seconds=0.065), open_checkpoint(str(tiny_model))
    with pytest.raises(InputError, match="headrace bench steps"):
        resolve_options(options, checkpoint)
    monkeypatch.setattr("headrace.engine.loading.load_step_time", lambda setting: TIMES)
    assert resolve_options(options, checkpoint).options.step_tokens == 64
