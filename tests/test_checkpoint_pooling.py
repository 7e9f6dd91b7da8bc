"""How models make one vector of a text, as sentence-transformers and llama.cpp write it down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType
from huggingface_hub.utils import filter_repo_objects
from tiny_gguf import write_gguf

from headrace.checkpoint.pooling import read_pooling
from headrace.checkpoint.sources import HUB_FILES, HUB_REPEATS
from headrace.core import ModelError

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


def write_folder(folder: Path, modules: Any = None, settings: Any = None, place: str = "1_Pooling") -> Path:
    for name, content in (("modules.json", modules), (f"{place}/config.json", settings)):
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("modules", [None, [TRANSFORMER, POOLING], [TRANSFORMER, POOLING, NORMALIZE]])
def test_folders_say_how(modules: Any, tmp_path: Path) -> None:
    assert read_pooling(write_folder(tmp_path, modules)) == "mean"
    last = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    assert read_pooling(write_folder(tmp_path, modules, last)) == "last"


def test_the_pooling_may_lie_in_another_folder(tmp_path: Path) -> None:
    modules = [TRANSFORMER, POOLING | {"path": "3_Pooling"}]
    assert read_pooling(write_folder(tmp_path, modules, {"pooling_mode_lasttoken": True}, "3_Pooling")) == "last"


@pytest.mark.parametrize(
    ("modules", "settings", "message"),
    [
        ([TRANSFORMER, POOLING, DENSE], None, "vectors of a model with Dense are not supported; Transformer, Pooling"),
        ({"a": 1}, None, "modules.json: not a list of modules"),
        ([3], None, "modules.json: not a list of modules"),
        (None, [], "config.json: must hold a JSON object, got list"),
        (None, {"pooling_mode_cls_token": True}, "pooling_mode_cls_token is not supported; pooling_mode_mean_tokens"),
        (None, {}, "no pooling is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(modules: Any, settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        read_pooling(write_folder(tmp_path, modules, settings))


@pytest.mark.parametrize(("number", "pooling"), [(None, "mean"), (0, "mean"), (1, "mean"), (3, "last")])
def test_gguf_files_say_how(number: int | None, pooling: str, tmp_path: Path) -> None:
    keys = {} if number is None else {"qwen3__pooling_type": (number, GGUFValueType.UINT32)}
    assert read_pooling(write_gguf(tmp_path / "a.gguf", "qwen3", **keys)) == pooling


def test_a_gguf_files_other_pooling_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", llama__pooling_type=(2, GGUFValueType.UINT32))
    with pytest.raises(ModelError, match="pooling_type 2 is not supported"):
        read_pooling(path)


def test_a_hub_model_comes_with_its_pooling_and_once() -> None:
    wanted = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    wanted += ["modules.json", "1_Pooling/config.json", "special_tokens_map.json", "added_tokens.json"]
    repeats = ["consolidated.safetensors", "consolidated.safetensors.index.json", "original/model.safetensors"]
    other = ["README.md", "pytorch_model.bin", "2_Dense/model.safetensors", "onnx/config.json"]
    fetched = filter_repo_objects([*wanted, *repeats, *other], allow_patterns=HUB_FILES, ignore_patterns=HUB_REPEATS)
    assert list(fetched) == wanted
