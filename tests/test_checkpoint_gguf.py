"""GGUF files: tensors, names and configuration as Hugging Face has them, and one clear line for each damage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import HEAD, HEADS, HIDDEN, KV_HEADS, LAYERS, TOKENS, random_tensors, write_gguf

from headrace.checkpoint import open_checkpoint
from headrace.kernels.reference import PlainWeight, ReferenceKernels, dequantize
from headrace.model import ModelSettings, load_model
from headrace.quant.int4 import Int4

TYPES = gguf.GGMLQuantizationType
U32, F32, STRING = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3"]


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's order to GGUF's, as llama.cpp's converter does it."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def test_llama_rows_come_back_in_hugging_face_order(tmp_path: Path) -> None:
    original = random_tensors("llama")
    stored = dict(original)
    for layer in range(LAYERS):
        for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            name = f"blk.{layer}.{part}.weight"
            stored[name] = permute(original[name], heads)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", "llama", stored))
    for part, name in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"), ("attn_output", "o_proj")):
        found = checkpoint.tensor(f"model.layers.1.self_attn.{name}.weight")
        assert np.array_equal(found.numpy(), original[f"blk.1.{part}.weight"])
        assert found.is_contiguous() and found.dtype == torch.float32


def test_llama_equals_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_gguf(tmp_path / "a.gguf", "llama", llama__rope__dimension_count=(HEAD, U32))
    checkpoint = open_checkpoint(path)
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    model = transformers.LlamaForCausalLM(config)
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    assert theirs.keys() == checkpoint.names()
    for name, value in theirs.items():
        assert torch.equal(checkpoint.tensor(name), torch.as_tensor(value)), name
    for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "tie_word_embeddings", "model_type"):
        assert checkpoint.config[name] == getattr(config, name), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_its_name(tmp_path: Path, family: str) -> None:
    stored = random_tensors(family) | {"output.weight": np.ones((len(TOKENS), HIDDEN), np.float32)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", family, stored))
    assert len(checkpoint.names()) == len(stored)
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.tensor("lm_head.weight").shape == (len(TOKENS), HIDDEN)
    shift = 1.0 if family == "gemma3" else 0.0
    assert torch.equal(checkpoint.tensor("model.norm.weight"), torch.from_numpy(stored["output_norm.weight"] - shift))
    before_mlp = "pre_feedforward_layernorm" if family == "gemma3" else "post_attention_layernorm"
    found = checkpoint.tensor(f"model.layers.1.{before_mlp}.weight")
    assert torch.equal(found, torch.from_numpy(stored["blk.1.ffn_norm.weight"] - shift))
    if family == "qwen2":
        bias = checkpoint.tensor("model.layers.0.self_attn.q_proj.bias")
        assert np.array_equal(bias.numpy(), stored["blk.0.attn_q.bias"])
    if family != "llama":
        weight = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")
        assert np.array_equal(weight.numpy(), stored["blk.0.attn_q.weight"])


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("F32", 0),
        ("F16", 2e-3),
        ("BF16", 2e-2),
        ("Q8_0", 0.03),
        ("Q5_0", 0.3),
        ("Q5_1", 0.2),
        ("Q4_0", 0.6),
        ("Q4_1", 0.3),
    ],
)
def test_tensor_types(tmp_path: Path, kind: str, error: float) -> None:
    stored = random_tensors("qwen3")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", "qwen3", stored, TYPES[kind]))
    for name, part in (("mlp.down_proj", "ffn_down"), ("self_attn.o_proj", "attn_output")):
        found = checkpoint.tensor(f"model.layers.1.{name}.weight")
        source = stored[f"blk.1.{part}.weight"]
        assert found.shape == source.shape
        assert np.abs(found.float().numpy() - source).max() <= error
        assert found.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_4_bit_blocks_are_what_is_stored(tmp_path: Path, kind: str) -> None:
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", quantise=TYPES[kind])))
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.1.{part}.weight"
        blocks = checkpoint.blocks(name)
        assert blocks is not None
        matrix = Int4().adopt(*blocks)
        assert matrix is not None
        torch.testing.assert_close(dequantize(matrix).float(), checkpoint.tensor(name), rtol=1e-6, atol=1e-6)
    assert checkpoint.blocks("model.norm.weight") is None


def test_int4_multiplies_stored_blocks_and_rounds_others(tmp_path: Path) -> None:
    for kind in ("Q4_1", "Q8_0"):
        checkpoint = open_checkpoint(str(write_gguf(tmp_path / f"{kind}.gguf", quantise=TYPES[kind])))
        model = load_model(checkpoint, ReferenceKernels(), ModelSettings(precision="int4"))
        weight = model.layers[0].down.weight
        assert isinstance(weight, PlainWeight) and weight.matrix.values.dtype == torch.uint8
        found, stored = dequantize(weight.matrix).float(), checkpoint.tensor("model.layers.0.mlp.down_proj.weight")
        step = dequantize(weight.matrix).abs().amax() / 7
        assert (found - stored).abs().amax() < (1e-6 if kind == "Q4_1" else step)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_types_are_read_as_the_library_reads_them(tmp_path: Path, kind: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    packed = np.random.default_rng(0).integers(0, 60, (HIDDEN, size * 2), dtype=np.uint8)
    tensors = random_tensors("qwen3") | {f"blk.{layer}.ffn_down.weight": packed for layer in range(LAYERS)}
    for name in ("ffn_gate", "ffn_up"):
        tensors |= {f"blk.{layer}.{name}.weight": np.ones((block * 2, HIDDEN), np.float32) for layer in range(LAYERS)}
    path = write_gguf(tmp_path / "a.gguf", "qwen3", tensors, TYPES[kind], qwen3__feed_forward_length=(block * 2, U32))
    found = open_checkpoint(path).tensor("model.layers.1.mlp.down_proj.weight")
    assert found.shape == (HIDDEN, block * 2)
    assert np.array_equal(found.numpy(), gguf.dequantize(packed, TYPES[kind]))


def test_config_of_a_llama(tmp_path: Path) -> None:
    config = open_checkpoint(write_gguf(tmp_path / "a.gguf")).config
    expected = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    assert expected.items() <= config.items()


@pytest.mark.parametrize(("family", "model_type"), [("qwen2", "qwen2"), ("qwen3", "qwen3"), ("gemma3", "gemma3_text")])
def test_config_of_other_families(tmp_path: Path, family: str, model_type: str) -> None:
    config = open_checkpoint(write_gguf(tmp_path / "a.gguf", family)).config
    assert config["model_type"] == model_type
    assert config["attention_bias"] is (family == "qwen2")
    if family == "gemma3":
        assert config["sliding_window"] == 8 and config["rope_local_base_freq"] == 10000.0
        assert config["layer_types"] == ["sliding_attention"] * 2 and config["query_pre_attn_scalar"] == HEAD
        assert config["hidden_activation"] == "gelu_pytorch_tanh"


def test_mistral_window_and_soft_caps(tmp_path: Path) -> None:
    config = open_checkpoint(write_gguf(tmp_path / "a.gguf", llama__attention__sliding_window=(128, U32))).config
    assert config["model_type"] == "mistral" and config["sliding_window"] == 128
    metadata: dict[str, Any] = {"gemma3__final_logit_softcapping": (30.0, F32)}
    config = open_checkpoint(write_gguf(tmp_path / "b.gguf", "gemma3", **metadata)).config
    assert config["final_logit_softcapping"] == 30.0 and config["attn_logit_softcapping"] is None


def test_rope_scalings(tmp_path: Path) -> None:
    def read(tensors: dict[str, np.ndarray] | None = None, **metadata: Any) -> Any:
        keys = {f"llama__rope__{name}": value for name, value in metadata.items()}
        return open_checkpoint(write_gguf(tmp_path / "a.gguf", "llama", tensors, **keys)).config["rope_scaling"]

    linear = read(scaling__type=("linear", STRING), scaling__factor=(4.0, F32))
    assert linear == {"rope_type": "linear", "factor": 4.0}
    original = {"scaling__original_context_length": (128, U32), "scaling__attn_factor": (2.0, F32)}
    yarn = read(scaling__type=("yarn", STRING), scaling__factor=(4.0, F32), **original)
    assert yarn["rope_type"] == "yarn" and yarn["original_max_position_embeddings"] == 128
    assert yarn["attention_factor"] == pytest.approx(2 * (1 + 0.1 * math.log(4)))
    factors = np.linspace(1, 8, HEAD // 2, dtype=np.float32)
    llama3 = read(random_tensors("llama") | {"rope_freqs.weight": factors})
    assert llama3 == {"rope_type": "factors", "factors": factors.tolist()}
    assert read(random_tensors("llama") | {"rope_freqs.weight": np.ones(HEAD // 2, np.float32)}) is None


def test_rope_factors_equal_llama3_scaling() -> None:
    """What llama.cpp's converter writes, divided out, gives transformers' llama3 frequencies."""
    transformers = pytest.importorskip("transformers")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    config = transformers.LlamaConfig(head_dim=64, rope_parameters=scaling, max_position_embeddings=131072)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    factors = []
    for wavelength in (2 * math.pi / plain).tolist():  # conversion/llama.py of llama.cpp
        if wavelength < 8192 / 4.0:
            factors.append(1.0)
        elif wavelength > 8192 / 1.0:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    torch.testing.assert_close(plain / torch.tensor(factors), theirs, rtol=1e-5, atol=0)


def test_smollm2_opens_fast_and_whole(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path)
    assert len(checkpoint.names()) == 272
    assert sum(checkpoint.tensor(name).numel() for name in checkpoint.names()) == 134_515_008
    assert checkpoint.hash() == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert checkpoint.nbytes == smollm2_path.stat().st_size
    assert checkpoint.config["rope_theta"] == 100000.0 and checkpoint.config["head_dim"] == 64


def test_gemma_tensors_equal_the_library(gemma_path: Path) -> None:
    checkpoint = open_checkpoint(gemma_path)
    config = checkpoint.config
    globals_ = [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    assert globals_ == [5, 11, 17] and config["sliding_window"] == 512 and config["head_dim"] == 256
    packed = checkpoint._header.tensors  # type: ignore[attr-defined]
    data = np.memmap(gemma_path, np.uint8, mode="r")
    for stored, name in (
        ("blk.0.attn_output", "self_attn.o_proj"),
        ("blk.0.ffn_down", "mlp.down_proj"),
        ("blk.0.attn_q", "self_attn.q_proj"),
        ("blk.0.attn_v", "self_attn.v_proj"),
    ):
        entry = packed[f"{stored}.weight"]
        rows = data[entry.start : entry.start + entry.nbytes].reshape(entry.shape[0], -1)
        found = checkpoint.tensor(f"model.layers.0.{name}.weight")
        assert np.array_equal(found.numpy(), gguf.dequantize(rows, entry.type))
    assert {packed[f"blk.0.{part}.weight"].type.name for part in ("attn_output", "ffn_down", "attn_q")} == {
        "Q4_K",
        "Q6_K",
        "Q5_0",
    }
