"""What number formats cost: perplexity, agreement, and the choice that `auto` makes of them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared_data
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from tokenizers.processors import TemplateProcessing

from headrace import LLM
from headrace.checkpoint import open_checkpoint
from headrace.cli import main
from headrace.cli.outcome import NotKept, keeping
from headrace.core import InputError
from headrace.engine import precision
from headrace.engine.precision import choose_precision
from headrace.judge.quality import cut_text, cut_windows, find_begin, measure_agreement, measure_perplexity
from headrace.meter import losses
from headrace.meter.peaks import Peaks, load_peaks, save_peaks
from headrace.options import EngineOptions
from headrace.quant.int8 import Int8

# int8 may raise perplexity by so much over bf16's.
INT8_LOSS = 0.015
# And 4-bit blocks as they are stored by so much.
INT4_LOSS = 0.02


def ignore(done: int, total: int) -> None:
    assert 0 < done <= total


def test_windows() -> None:
    assert cut_windows(list(range(10)), 4, 100) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_windows(list(range(10)), 4, 7) == [[0, 1, 2, 3]]
    with pytest.raises(InputError, match="3 tokens, fewer than a window of 4"):
        cut_windows([1, 2, 3], 4, 100)
    with pytest.raises(
        InputError, match="the first 3 of the text's 10 tokens are fewer than a window of 4: raise --tokens"
    ):
        cut_windows(list(range(10)), 4, 3)
    with pytest.raises(InputError, match="predicts nothing"):
        cut_windows([1, 2, 3], 1, 100)
    assert cut_windows(list(range(7)), 4, 100, [99]) == [[99, 0, 1, 2], [99, 3, 4, 5]]
    with pytest.raises(InputError, match="use 3 or more"):
        cut_windows([1, 2, 3], 2, 100, [99])


@pytest.mark.parametrize("begin", [[], [0]])
def test_every_window_begins_as_the_model_wants_it(begin: list[int], tiny_model: Path) -> None:
    tokenizer = open_checkpoint(str(tiny_model)).tokenizer()
    if begin:
        template = TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.backend.post_processor = template
    windows = cut_text("the wheel turns " * 40, tokenizer, 32, 1000)
    text = tokenizer.encode("the wheel turns " * 40, special=False)
    assert find_begin(tokenizer) == begin and len(windows) >= 2
    assert [each[: len(begin)] for each in windows] == [begin] * len(windows)
    own = [token for each in windows for token in each[len(begin) :]]
    assert own == text[: len(windows) * (32 - len(begin))]


def test_perplexity_equals_the_score_of_the_same_windows(tiny_model: Path) -> None:
    with LLM(str(tiny_model), precision="fp32", kv_cache_bytes=1 << 22, threads=1) as llm:
        windows = [[1 + (7 * place + shift) % 90 for place in range(40)] for shift in range(6)]
        found = measure_perplexity(llm.engine.model, windows, ignore)
        logprobs = [value for each in llm.score(windows) for value in each.logprobs if value is not None]
        assert found.tokens == len(logprobs) == 6 * 39
        assert found.perplexity == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=1e-5)
        same = measure_agreement(llm.engine.model, llm.engine.model, windows, ignore)
        assert (same.top1, same.kl, same.tokens) == (1.0, 0.0, found.tokens)
        assert same.perplexity == same.other_perplexity == pytest.approx(found.perplexity)


@pytest.mark.parametrize(("precision", "most"), [("int8", INT8_LOSS), ("int4", INT4_LOSS)])
def test_integers_lose_little_of_the_real_model(smollm2_path: Path, precision: Any, most: float) -> None:
    text = shared_data("wikitext2_test.txt").read_text()
    # Kept weights may have been made with a text: these are what the file gives.
    settings = {"kv_cache_bytes": 1 << 26, "keep_packed": False}
    with (
        LLM(str(smollm2_path), precision="bf16", **settings) as exact,
        LLM(str(smollm2_path), precision=precision, **settings) as fast,
    ):
        windows = cut_windows(exact.tokenizer.encode(text), 512, 12 * 512)
        found = measure_agreement(exact.engine.model, fast.engine.model, windows, ignore)
    assert found.other_perplexity / found.perplexity - 1 < most
    assert found.top1 > 0.9 and 0 < found.kl < 0.03


def test_int8_stores_the_nearest_values() -> None:
    weight = torch.randn(20, 33)
    weight[3] = 0
    matrix = Int8().store(weight)
    assert matrix.scales is not None and matrix.values.dtype == torch.int8
    error = (matrix.values * matrix.scales[:, None] - weight).abs()
    assert bool((error <= matrix.scales[:, None] / 2 + 1e-7).all()) and not matrix.values[3].any()


def test_auto_takes_int8_only_where_its_loss_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "losses_path", lambda: tmp_path / "losses.json")
    options = EngineOptions()
    assert choose_precision(EngineOptions(precision="fp32"), "avx512_bf16", "m") == ("fp32", "asked for")
    chosen, why = choose_precision(options, "avx512_bf16", "m")
    assert chosen == "bf16" and "not known" in why
    losses.save_loss("m", "int8", 0.008)
    losses.save_loss("other", "int8", precision.MOST_LOSS + 0.01)
    chosen, why = choose_precision(options, "avx512_bf16", "m")
    assert chosen == "int8" and "0.8%" in why
    chosen, why = choose_precision(options, "avx512_bf16", "other")
    assert chosen == "bf16" and "more than 1.5%" in why
    assert choose_precision(options, "portable", "m")[0] == "fp32"
    for damaged in (math.nan, math.inf, -math.inf):
        losses.save_loss("damaged", "int8", damaged)
        chosen, why = choose_precision(options, "avx512_bf16", "damaged")
        assert chosen == "bf16" and "not known" in why
    (tmp_path / "losses.json").write_text("[broken")
    assert choose_precision(options, "avx2", "m")[0] == "fp32"


def test_eval_from_the_command_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(losses, "losses_path", lambda: tmp_path / "losses.json")
    text = tmp_path / "text.txt"
    text.write_text("The mill by the river grinds wheat. " * 2000)
    common = ["--text", str(text), "--model", str(tiny_model), "--window", "32", "--json"]
    assert main(["eval", "ppl", *common, "--precision", "int8"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "int8"
    assert main(["eval", "agree", *common, "--precision", "int8", "--against", "fp32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["precision"], found["against"]) == ("int8", "fp32") and found["top1"] > 0.5
    assert (tmp_path / "losses.json").exists()
    assert main(["eval", "ppl", "--text", str(tmp_path / "none.txt"), "--model", str(tiny_model)]) == 2
    assert "cannot be read as text" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["eval", "ppl"], ["eval", "agree"], ["quantize"]])
def test_windows_that_the_model_cannot_read_are_refused(
    command: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The mill by the river grinds wheat. " * 2000)
    assert main([*command, "--text", str(text), "--model", str(tiny_model), "--window", "1025"]) == 2
    assert "--window: must be at most the model's context of 1,024 tokens, got 1,025" in capsys.readouterr().err
    assert main([*command, "--text", str(text), "--model", str(tiny_model), "--tokens", "100"]) == 2
    assert "a window of 512: raise --tokens or lower --window" in capsys.readouterr().err


def test_a_window_may_fill_the_context(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The mill by the river grinds wheat. " * 100)
    asked = ["--text", str(text), "--model", str(tiny_model), "--precision", "fp32", "--window", "1024", "--json"]
    assert main(["eval", "ppl", *asked]) == 0
    assert json.loads(capsys.readouterr().out)["window"] == 1024


def test_a_model_without_numbers_is_shown_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, text = make_tiny_model(tmp_path / "damaged", head_dim=32), tmp_path / "text.txt"
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text.write_text("The mill by the river grinds wheat.\n\n" * 1000)
    common = ["--text", str(text), "--model", str(folder), "--precision", "fp32", "--json"]

    def read(*command: str) -> dict[str, Any]:
        assert main(["eval", *command, *common]) == 0
        (line, *_) = capsys.readouterr().out.splitlines()
        return json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    assert read("ppl", "--window", "32")["perplexity"] is None
    found = read("agree", "--against", "fp32", "--window", "32")
    assert (found["loss"], found["kl"], found["kept"]) == (None, None, False) and found["tokens"] > 4096
    assert not (tmp_path / "cache" / "headrace" / "losses.json").exists()
    found = read("kv", "--kv", "kivi", "--windows", "2", "--contexts", "64")
    assert found["prefix"] == {"dnll": None, "error": None, "kl": None, "top1": 1.0} and found["bytes_per_token"] > 0
    found = read("contexts", "--kv", "kivi", "--tokens", "200", "--task", "math_find")
    assert found["delta"] is None and found["turns"] > 0


@pytest.mark.parametrize("as_json", [True, False])
def test_a_loss_that_cannot_be_kept_is_shown(
    as_json: bool,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The cache folder would have to be where a file is.
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("The mill by the river grinds wheat. " * 2000)
    asked = ["--text", str(text), "--model", str(tiny_model), "--window", "32", "--against", "fp32"]
    assert main(["eval", "agree", *asked, *(["--json"] if as_json else [])]) == 3
    printed = capsys.readouterr()
    if as_json:
        assert json.loads(printed.out)["kept"] is False
    assert "loss" in printed.out and "top1" in printed.out
    assert re.fullmatch(
        rf"headrace: error: the result cannot be kept in {tmp_path}/cache/headrace/losses\.json: Not a directory; .*\n",
        printed.err,
    )


def test_a_full_disk_refuses_after_the_result(tmp_path: Path) -> None:
    path = tmp_path / "peaks.json"
    # What is written there finds no room, as on a full disk.
    (tmp_path / "peaks.json.part").symlink_to("/dev/full")
    peaks, heard = Peaks("machine", 2, {}, {}, {}), []
    with (
        pytest.raises(NotKept, match=rf"{path}: No space left on device; make room or make {tmp_path} w") as refused,
        keeping(path, lambda: save_peaks(peaks, path)) as kept,
    ):
        heard.append(kept)
    assert heard == [""] and refused.value.exit_code == 3
    (tmp_path / "peaks.json.part").unlink()
    with keeping(path, lambda: save_peaks(peaks, path)) as kept:
        assert kept == f"kept in {path}" and load_peaks("machine", 2, path) == peaks
