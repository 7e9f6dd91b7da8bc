"""Damaged, truncated and unsupported GGUF files: one clear line for each, never a crash."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_gguf import HEAD, random_tensors, write_gguf

from headrace.checkpoint import open_checkpoint
from headrace.checkpoint.gguf_header import read_header
from headrace.core import ModelError

TYPES = gguf.GGMLQuantizationType
U32, F32, STRING = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING


DAMAGE: list[tuple[str, dict[str, Any], str]] = [
    ("phi3", {}, "architecture 'phi3' is not supported; these are: llama, qwen2, qwen3, gemma3"),
    ("llama", {"llama__block_count": None}, "metadata llama.block_count is missing"),
    ("llama", {"llama__block_count": (1000, U32)}, "1000 layers but 20 tensors"),
    (
        "llama",
        {"llama__attention__head_count": (8, U32)},
        "'model.layers.0.self_attn.q_proj.weight' has shape (64, 64)",
    ),
    (
        "llama",
        {"llama__block_count": (3, U32)},
        "tensor 'model.layers.2.self_attn.q_proj.weight' and 8 more are missing",
    ),
    (
        "llama",
        {"llama__attention__head_count": (0, U32)},
        "llama.attention.head_count must be one number above 0, got 0",
    ),
    ("llama", {"llama__attention__head_count_kv": [1, 2]}, "llama.attention.head_count_kv must be one number above 0"),
    ("llama", {"llama__expert_count": (8, U32)}, "mixtures of experts are not supported"),
    ("llama", {"llama__attention__value_length": (8, U32)}, "attention.value_length other than the head size 16"),
    (
        "llama",
        {"llama__rope__scaling__type": ("longrope", STRING), "llama__rope__scaling__factor": (2.0, F32)},
        "'longrope'",
    ),
    ("llama", {"split__count": (4, gguf.GGUFValueType.UINT16)}, "one of 4 parts; join them"),
]


@pytest.mark.parametrize(("family", "metadata", "message"), DAMAGE, ids=[case[2][:30] for case in DAMAGE])
def test_unsupported_metadata(tmp_path: Path, family: str, metadata: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "a.gguf", family, random_tensors("llama"), **metadata)
    with pytest.raises(ModelError) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_missing_and_unknown_tensors(tmp_path: Path) -> None:
    tensors = random_tensors("llama")
    del tensors["blk.1.ffn_down.weight"]
    with pytest.raises(ModelError, match=r"tensor 'model.layers.1.mlp.down_proj.weight' is missing; fetch"):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", "llama", tensors))
    with pytest.raises(ModelError, match=r"tensor 'blk.0.ssm_a' is not supported"):
        open_checkpoint(
            write_gguf(tmp_path / "b.gguf", tensors=random_tensors("llama") | {"blk.0.ssm_a": np.ones(4, np.float32)})
        )
    headless = {name: value for name, value in random_tensors("llama").items() if name != "token_embd.weight"}
    with pytest.raises(ModelError, match=r"'token_embd.weight' is missing"):
        open_checkpoint(write_gguf(tmp_path / "c.gguf", tensors=headless))
    with pytest.raises(ModelError, match=r"tensor 'model.nothing' is missing"):
        open_checkpoint(write_gguf(tmp_path / "d.gguf")).tensor("model.nothing")


def test_unsupported_tensor_type(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tensor 'token_embd.weight' has unsupported type TQ2_0; use a file with F32"):
        tensors = {"token_embd.weight": np.zeros((8, 256), np.float32)}
        open_checkpoint(write_gguf(tmp_path / "a.gguf", "llama", tensors, TYPES.TQ2_0))


def test_wrong_magic_and_version(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for content, message in (
        (b"", "not a GGUF file: it is empty"),
        (b"PK\x03\x04 zip", "it begins with b'PK"),
        (b"GG", "it begins with b'GG'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1 is not supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"\(big-endian\) is not supported"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "header ends early"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**63), "header ends early"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**50) + bytes(64),
            "header ends early",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 4, 2**61) + bytes(64),
            "header ends early",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 99) + bytes(64),
            "unknown kind of metadata 99",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 9, 1) + bytes(64),
            "unknown kind of array 9",
        ),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + struct.pack("<I", 9) + bytes(64), "has 9 dimensions"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=message) as error:
            open_checkpoint(path)
        assert str(path) in str(error.value)


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "a.gguf").read_bytes()
    path = tmp_path / "b.gguf"
    for length in [*range(4, 200), *range(200, len(whole) - 4, 997), len(whole) - 64]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="truncated"):
            open_checkpoint(path)


def test_damage_anywhere_in_the_header_never_crashes(tmp_path: Path) -> None:
    whole = bytearray(write_gguf(tmp_path / "a.gguf").read_bytes())
    random = np.random.default_rng(0)
    path = tmp_path / "b.gguf"
    refused = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        for place in random.integers(4, 12000, 4):
            damaged[place] = int(random.integers(0, 256))
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint.names():
                checkpoint.tensor(name)
            checkpoint.tokenizer()
        except ModelError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    "value", [("text", STRING), ([1, 2]), (["a", "b"]), (0, U32), (2**32 - 1, U32), (math.nan, F32)]
)
def test_metadata_of_a_wrong_kind_never_crashes(tmp_path: Path, value: Any) -> None:
    path = write_gguf(tmp_path / "a.gguf", "gemma3")
    keys = [name for name in read_header(path).metadata if not name.startswith("GGUF")]
    refused = 0
    for key in keys:
        if key == "general.architecture":
            continue
        write_gguf(path, "gemma3", **{key.replace(".", "__"): value})
        try:
            open_checkpoint(path).tokenizer().encode("a a")
        except ModelError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= 5


def test_tensors_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    for name in ("blk.0.attn_q_norm.weight", "blk.0.attn_norm.bias", "output_norm.bias", "blk.x.attn_q.weight"):
        with pytest.raises(ModelError, match=f"tensor '{name}' is not supported in this family"):
            tensors = random_tensors("llama") | {name: np.ones(HEAD, np.float32)}
            open_checkpoint(write_gguf(tmp_path / "a.gguf", "llama", tensors))
