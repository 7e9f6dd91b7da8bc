"""Hugging Face folders: sharded and nested ones are read whole, damaged and pickle ones refused in one clear line."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

from headrace.checkpoint import open_checkpoint
from headrace.core import ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "headrace"


def shard(folder: Path) -> dict[str, torch.Tensor]:
    """Cut the folder's weights into two files with an index; returns the weights."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return weights


def refusal(folder: Path) -> str:
    """The one line with which opening (or using) the folder fails."""
    with pytest.raises(ModelError) as error:
        checkpoint = open_checkpoint(folder)
        checkpoint.tokenizer()
        for name in sorted(checkpoint.names()):
            checkpoint.tensor(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_plain_folder(folder: Path, own_cache: Path) -> None:
    checkpoint = open_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    assert checkpoint.path == folder
    assert checkpoint.names() == weights.keys()
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in weights.items())
    data = (folder / "model.safetensors").read_bytes()
    assert checkpoint.hash() == hashlib.sha256(data).hexdigest() and checkpoint.nbytes == len(data)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.eos_token_ids == {2} and tokenizer.size == checkpoint.config["vocab_size"]
    assert tokenizer.render_chat([{"role": "user", "content": "a"}]).endswith("<|im_start|>assistant\n")


def test_hash_is_remembered_until_the_file_changes(folder: Path, own_cache: Path) -> None:
    first = open_checkpoint(folder).hash()
    remembered = own_cache / "hashes.json"
    (key,) = json.loads(remembered.read_text())
    remembered.write_text(json.dumps({key: "remembered"}))
    assert open_checkpoint(folder).hash() == "remembered"
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    assert open_checkpoint(folder).hash() not in ("remembered", first)
    remembered.write_text("{torn")
    assert len(open_checkpoint(folder).hash()) == 64


def test_sharded_folder(folder: Path) -> None:
    weights = shard(folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.names() == weights.keys()
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in weights.items())


def test_missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "names the weight file 'model-00002-of-00002.safetensors', which is missing" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}'])
def test_damaged_index(folder: Path, content: str) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json: " in refusal(folder)


def test_index_may_not_name_files_elsewhere(folder: Path) -> None:
    shard(folder)
    save_file({"a": torch.ones(1)}, folder.parent / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'../outside.safetensors', which is missing" in refusal(folder)


@pytest.mark.parametrize("length", [0, 5, 100, 5000, -1])
def test_truncated_weights(folder: Path, length: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert f"{file}: truncated or damaged safetensors file" in refusal(folder)


def test_tensor_missing(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"tensor 'lm_head.weight' is missing; fetch the folder again"):
        open_checkpoint(folder).tensor("lm_head.weight")


def test_unsupported_dtype(folder: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int8)}, folder / "model.safetensors")
    assert "tensor 'a' has unsupported type I8; use a checkpoint in BF16, F16, F32" in refusal(folder)


class Trap:
    """Unpickling this writes a file, as a malicious checkpoint would."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "ran"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "weights.ckpt"])
def test_pickle_is_refused_and_never_run(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    target = folder / "ran"
    (folder / name).write_bytes(pickle.dumps(Trap(target)))
    assert f"{folder / name}: pickle checkpoint refused" in refusal(folder)
    with pytest.raises(ModelError, match="pickle checkpoint refused"):
        open_checkpoint(folder / name)
    assert not target.exists()


def test_other_missing_and_damaged_files(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json: not a tokenizer that can be read" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json: missing; save the model's fast tokenizer there" in refusal(folder)
    (folder / "config.json").write_text("not json")
    assert "config.json: not JSON" in refusal(folder)
    (folder / "config.json").write_text("[1]")
    assert "config.json: must hold a JSON object, got list" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json: missing; a model folder needs its config.json" in refusal(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "no model.safetensors here" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pickle checkpoint refused" in refusal(folder)


def test_unknown_decoder_is_named(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"decoder": {"type": "Fuse"}}))
    assert "decoder ['Fuse'] is not supported" in refusal(folder)


def test_end_tokens_and_templates(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    assert open_checkpoint(folder).tokenizer().eos_token_ids == {0, 1, 2}
    settings = {"eos_token": {"content": "<|im_end|>"}, "chat_template": [{"name": "default", "template": "listed"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_checkpoint(folder).tokenizer().chat_template == "listed"
    (folder / "chat_template.jinja").write_text("file {{ eos_token }}")
    assert open_checkpoint(folder).tokenizer().render_chat([]) == "file <|im_end|>"


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_multimodal_gemma_is_unwrapped(folder: Path, prefix: str) -> None:
    weights = {
        prefix + "norm.weight": torch.ones(4),
        "vision_tower.a.weight": torch.ones(2),
        "lm_head.weight": torch.ones(3),
    }
    save_file(weights, folder / "model.safetensors")
    inner = {"model_type": "gemma3_text", "hidden_size": 2560, "sliding_window": 1024}
    outer = {"model_type": "gemma3", "text_config": inner, "vision_config": {}, "eos_token_id": [1, 106]}
    (folder / "config.json").write_text(json.dumps(outer))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.names() == {"model.norm.weight", "lm_head.weight"}
    assert torch.equal(checkpoint.tensor("model.norm.weight"), torch.ones(4))
    expected = {"model_type": "gemma3_text", "hidden_size": 2560, "sliding_window": 1024, "num_attention_heads": 8}
    assert expected.items() <= checkpoint.config.items() and checkpoint.config["eos_token_id"] == [1, 106]


def test_gemma_defaults_are_those_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from headrace.checkpoint.safetensors_folder import GEMMA3_TEXT

    theirs = transformers.Gemma3TextConfig()
    assert {name: getattr(theirs, name) for name in GEMMA3_TEXT} == GEMMA3_TEXT


def test_model_settings_that_name_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    for model, message in (
        ("smolm2-135m", "did you mean smollm2-135m"),
        (
            "nothing-like-it",
            "must be a known name (smollm2-135m, gemma3-270m), a model folder, a .gguf file or a hub id",
        ),
        (str(tmp_path / "missing.gguf"), "is not here"),
        (str(tmp_path / "a.safetensors"), "not a .gguf file; for safetensors give the folder"),
        ("gemma3-270m", "fetch it with `headrace pull gemma3-270m`"),
    ):
        with pytest.raises(ModelError) as error:
            open_checkpoint(model)
        assert message in str(error.value)


def test_hub_extra_is_named_when_missing() -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from headrace.checkpoint import open_checkpoint\n"
        "try: open_checkpoint('someone/some-model')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.startswith("ModelError") and "pip install 'headrace[hub]'" in said
