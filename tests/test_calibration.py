"""4-bit weights made with a text: what each method promises, and that the best is kept and used."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from tiny_gguf import write_gguf
from torch import Tensor

from headrace import LLM
from headrace.checkpoint import open_checkpoint
from headrace.cli import main
from headrace.core import InputError
from headrace.engine import loading
from headrace.judge.calibration import (
    STORED,
    Recorder,
    calibrate,
    describe_rounding,
    find_best,
    has_blocks,
    keep,
    record_inputs,
)
from headrace.judge.quality import measure_perplexity
from headrace.kernels.cpu import CpuKernels
from headrace.kernels.reference import ReferenceKernels, dequantize
from headrace.model import ModelSettings, load_model
from headrace.quant import packed
from headrace.quant.awq import find_input_scales
from headrace.quant.gptq import round_by_gptq
from headrace.quant.int4 import dequantize_groups, round_groups
from headrace.quant.packed import read_note

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
# By products of the tiny models; rounding does not look at them.
GRAMS = {f"model.layers.{layer}.{part}": torch.eye(96) for layer in range(2) for part in PARTS}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def stored_model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", quantise=GGMLQuantizationType.Q4_1)


def make_product() -> tuple[Tensor, Tensor]:
    """A weight [40, 96], and inputs [500, 96] that go together and of which a few are large."""
    inputs = torch.randn(500, 24) @ torch.randn(24, 96) + 0.3 * torch.randn(500, 96)
    inputs[:, ::17] *= 12
    return torch.randn(40, 96), inputs


def output_error(weight: Tensor, inputs: Tensor, near: Tensor) -> float:
    return float((inputs @ (near - weight).T).square().mean())


@pytest.mark.parametrize("group", [32, 64])
def test_each_method_changes_the_outputs_less_than_rounding(group: int) -> None:
    weight, inputs = make_product()
    gram = inputs.T @ inputs
    plain = output_error(weight, inputs, dequantize_groups(*round_groups(weight, group), group))
    moved = output_error(weight, inputs, dequantize_groups(*round_by_gptq(weight, gram, group), group))
    scales = find_input_scales(weight, gram, group)
    scaled = output_error(weight, inputs, dequantize_groups(*round_groups(weight * scales, group), group) / scales)
    assert moved < 0.6 * plain and scaled < 0.9 * plain
    assert scales[::17].mean() > scales.mean()


def test_gptq_without_a_preference_is_rounding() -> None:
    weight, _ = make_product()
    for found, expected in zip(round_by_gptq(weight, torch.eye(96), 32), round_groups(weight, 32), strict=True):
        assert torch.equal(found, expected)
    for part in round_by_gptq(weight, torch.zeros(96, 96), 32):
        assert part.isfinite().all()


def test_inputs_are_those_of_each_product(tiny_model: Path) -> None:
    recorder = Recorder(ReferenceKernels())
    model = load_model(open_checkpoint(str(tiny_model)), recorder, ModelSettings(precision="fp32"))  # type: ignore[arg-type]
    text = [1 + place % 90 for place in range(40)]
    grams = record_inputs(model, recorder, [text, text[:20]])
    assert len(grams) == 4 * len(model.layers)
    layer, residual = model.layers[0], model.embedding[torch.tensor(text + text[:20])]
    normed = ReferenceKernels().rms_norm(residual, layer.attention_norm, model.config.norm_eps)
    torch.testing.assert_close(grams[layer.query_key_value.name], normed.T @ normed, rtol=1e-4, atol=1e-4)


def test_what_is_measured_afterwards_adds_nothing(tiny_model: Path) -> None:
    recorder = Recorder(ReferenceKernels())
    model = load_model(open_checkpoint(str(tiny_model)), recorder, ModelSettings(precision="fp32"))  # type: ignore[arg-type]
    seen, held_back = ([[1 + (7 * place + shift) % 90 for place in range(32)]] for shift in range(2))
    grams = record_inputs(model, recorder, seen)
    before = {name: gram.clone() for name, gram in grams.items()}
    measure_perplexity(model, held_back, lambda done, total: None)
    assert grams.keys() == before.keys() and all(torch.equal(grams[name], before[name]) for name in before)
    # A second recording begins anew, and leaves the first alone.
    again = record_inputs(model, recorder, held_back)
    assert not any(torch.equal(again[name], before[name]) for name in before)
    assert all(torch.equal(grams[name], before[name]) for name in before)


def test_a_method_without_a_number_is_not_the_best() -> None:
    assert find_best({"rounding": math.nan, "gptq": 7.0, "awq": 6.0, "awq and gptq": 6.0}) == "awq"
    assert find_best({"rounding": math.nan, "gptq": math.inf}) == "gptq"
    assert find_best({"rounding": math.nan, "gptq": math.nan}) == "rounding"


def test_the_best_is_kept_and_used(tiny_model: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = cache.with_name("text.txt")
    text.write_text("The mill by the river grinds wheat, and the miller counts the sacks. " * 200)
    common = ["--text", str(text), "--model", str(tiny_model), "--window", "64", "--json", "--group", "64"]
    with LLM(str(tiny_model), precision="int4", kv_cache_bytes=1 << 22) as before:
        assert before.resolved["weights"] == ""
    assert main(["quantize", *common]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["perplexities"]) == {"rounding", "gptq", "awq", "awq and gptq"}
    assert found["best"] == min(found["perplexities"], key=found["perplexities"].get)
    kept = read_note(next(cache.glob("packed/*")))
    assert kept.startswith(f"4-bit groups of 64 by {found['best']}, text ")
    with LLM(str(tiny_model), precision="int4", kv_cache_bytes=1 << 22) as after:
        assert after.resolved["weights"] == kept
    assert main(["quantize", "--text", str(text), "--model", str(tiny_model), "--group", "48"]) == 2
    assert "must be 32, 64 or 128, got 48" in capsys.readouterr().err


def test_what_is_kept_is_what_was_found_best(cache: Path, stored_model: Path) -> None:
    checkpoint, kernels = open_checkpoint(str(stored_model)), ReferenceKernels()
    assert has_blocks(checkpoint)
    keep(checkpoint, kernels, describe_rounding("rounding", GRAMS, 32, "before"))
    assert [read_note(path) for path in cache.glob("packed/*")] == ["4-bit groups of 32 by rounding, text before"]
    windows = [[1 + (7 * place + shift) % 90 for place in range(32)] for shift in range(8)]
    outcome = calibrate(checkpoint, kernels, windows, 32, lambda text: None)
    keep(checkpoint, kernels, outcome.way)
    assert list(outcome.perplexities) == [STORED, "rounding", "gptq", "awq", "awq and gptq"]
    assert outcome.perplexities[outcome.best] == min(outcome.perplexities.values())
    notes = [read_note(path).split(",")[0] for path in cache.glob("packed/*")]
    assert notes == ([] if outcome.best == STORED else [f"4-bit groups of 32 by {outcome.best}"])
    with pytest.raises(InputError, match="4 windows of text or more, found 3"):
        calibrate(checkpoint, kernels, windows[:3], 32, lambda text: None)


def test_stored_blocks_come_back_where_they_are_best(cache: Path, stored_model: Path) -> None:
    checkpoint, kernels = open_checkpoint(str(stored_model)), ReferenceKernels()
    keep(checkpoint, kernels, describe_rounding("rounding", GRAMS, 32, "before"))
    keep(checkpoint, kernels, None)
    assert not list(cache.glob("packed/*"))


def test_a_disk_that_refuses_keeps_what_was_there(
    cache: Path, monkeypatch: pytest.MonkeyPatch, stored_model: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    checkpoint, kernels = open_checkpoint(str(stored_model)), ReferenceKernels()
    keep(checkpoint, kernels, describe_rounding("rounding", GRAMS, 32, "one"))
    monkeypatch.setattr(packed, "save_file", refuse)
    with pytest.raises(OSError, match="not written"):
        keep(checkpoint, kernels, describe_rounding("rounding", GRAMS, 32, "two"))
    assert [read_note(path) for path in cache.glob("packed/*")] == ["4-bit groups of 32 by rounding, text one"]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_what_was_measured_is_shown_where_the_disk_refuses(
    form: list[str], tiny_model: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = cache.with_name("text.txt")
    text.write_text("The mill by the river grinds wheat, and the miller counts the sacks. " * 100)
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "packed").write_text("a file where a folder is wanted")
    assert main(["quantize", "--text", str(text), "--model", str(tiny_model), "--window", "64", *form]) == 3
    printed = capsys.readouterr()
    assert "gptq" in printed.out and "kept for" not in printed.out
    if form:
        assert json.loads(printed.out)["kept"] is False
    # Before it, loading has said once that the packed weights are not kept.
    assert f"the result cannot be kept in {cache}/packed/" in printed.err.splitlines()[-1]


def test_a_job_does_not_go_on_with_other_weights(
    tiny_model: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text\nmill\nriver\n")
    command = ["run", str(rows), "-o", str(tmp_path / "out.csv"), "--model", str(tiny_model), "--precision", "int4"]
    command += ["--prompt", "{{ text }}", "--max-tokens", "2", "--kv-cache-bytes", "4MiB"]
    assert main(command) == 0
    checkpoint = open_checkpoint(str(tiny_model))
    keep(checkpoint, CpuKernels(), describe_rounding("rounding", GRAMS, 64, "new"))
    capsys.readouterr()
    assert main(command) == 2
    assert "weights was not set and is" in capsys.readouterr().err


def test_rounding_finds_the_grid_on_which_the_real_models_weights_lie(smollm2_path: Path) -> None:
    weight = open_checkpoint(str(smollm2_path)).tensor("model.layers.3.mlp.down_proj.weight")
    way = describe_rounding("rounding", {"down": torch.eye(weight.shape[1])}, 32, "none")
    found = dequantize(way.make("down", weight)).float()
    assert float((found - weight).abs().max()) < 2e-3 * float(weight.abs().max())
