"""Reading configs and weights: old and new shapes mean the same, and what cannot be used says why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ragged import logits_of
from safetensors.torch import load_file, save_file
from test_models import (
    CASE_IDS,
    CASES,
    GEMMA,
    LLAMA3,
    SLIDING,
    TINY,
    YARN,
    TransformersWeights,
    expected_logits,
    make_pair,
    make_text,
)
from tiny import make_tiny_model
from torch import Tensor

from headrace.cache.layout import CacheLayout
from headrace.checkpoint import open_checkpoint
from headrace.core import InputError, ModelError
from headrace.kernels import choose_kernels
from headrace.model import ModelSettings, load_model
from headrace.model.config import RopeSpec
from headrace.model.loading import FAMILIES, read_config
from headrace.model.rope import rope_frequencies

CPU = choose_kernels("reference", "cpu")
LINEAR_BY_2 = {"rope_type": "linear", "factor": 2.0}
KIND_BASES = {"full_attention": 500.0, "sliding_attention": 70.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 0}, "needs a whole number above 0 for 'num_attention_heads', found 0"),
        ({"vocab_size": 96.5}, "needs a whole number above 0 for 'vocab_size', found 96.5"),
        ({"rms_norm_eps": "small"}, "needs a number above 0 for 'rms_norm_eps', found 'small'"),
        (
            {"head_dim": None, "num_attention_heads": 10},
            r"hidden_size \(48\) must be a multiple of num_attention_heads \(10\)",
        ),
        ({"rope_parameters": {"rope_theta": "wide"}}, "needs a number above 0 for 'rope_theta', found 'wide'"),
        ({"rope_parameters": ["linear"]}, "needs an object for 'rope_parameters', found"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "unsupported partial_rotary_factor 0.5"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope scaling 'yarn' needs a number above 0 for 'factor', found None",
        ),
        (
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
            r"low_freq_factor \(4.0\) below high_freq_factor \(4.0\)",
        ),
        ({"rope_parameters": {"rope_type": "factors", "factors": [1.0]}}, "lists 1 factors for 8 frequencies"),
        ({"model_type": "mistral", "sliding_window": 0}, "needs a whole number above 0 for 'sliding_window', found 0"),
        ({"model_type": "mistral", "layer_types": ["chunked_attention"] * 3}, "unsupported kind 'chunked_attention'"),
        ({"model_type": "qwen2", "layer_types": SLIDING}, "lists sliding_attention, and the model's config sets no"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "unsupported use_bidirectional_attention"),
        ({"model_type": "mamba"}, "unsupported architecture 'mamba'; supported are gemma3_text, llama, mistral, qwen2"),
        ({"hidden_size": None}, "needs a whole number above 0 for 'hidden_size', found None"),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) must be a multiple of num_key_value_heads \(4\)"),
        ({"hidden_act": "relu"}, "unsupported activation 'relu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "unsupported rope scaling 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "rope scaling 'linear' needs a number above 0 for 'factor', found None",
        ),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"unsupported rope scaling \['yarn'\]"),
        ({"hidden_act": ["x"]}, r"unsupported activation \['x'\]"),
        ({"num_hidden_layers": 10**12}, r"says 1e\+12 for 'num_hidden_layers'; more than 16,777,216 is not supported"),
        ({"max_position_embeddings": 10**12}, r"says 1e\+12 for 'max_position_embeddings'"),
        ({"head_dim": 10**12}, r"says 1e\+12 for 'head_dim'"),
        ({"rope_parameters": YARN | {"factor": 1e300}}, r"says 6.4e\+301 for 'max_position_embeddings'"),
        ({"model_type": "mistral", "layer_types": 3}, "needs a list for 'layer_types', found 3"),
        ({"intermediate_size": 81}, r"gate_proj.weight has shape \[80, 48\]; its config needs \[81, 48\]"),
        ({"num_hidden_layers": 4}, "lacks the tensor model.layers.3"),
    ],
)
def test_models_that_cannot_be_used_say_why(change: dict[str, Any], message: str) -> None:
    oracle, _ = make_pair("Llama", {}, choose_kernels("reference", "cpu"))
    weights = TransformersWeights(oracle)
    weights.config = dict(weights.config) | change
    with pytest.raises(ModelError, match=message):
        load_model(weights, choose_kernels("reference", "cpu"), ModelSettings())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"layers.0.self_attn.q_proj.bias": torch.ones(96)},
            "layers.0.self_attn.q_proj.bias has no place in the model",
        ),
        ({"layers.1.self_attn.q_norm.weight": torch.ones(16)}, "layers.1.self_attn.q_norm.weight has no place"),
        (
            {"layers.0.mlp.up_proj.weight_scale": torch.ones(1), "score": torch.ones(1)},
            "weight_scale .*, nor have 1 others",
        ),
        ({"layers.0.mlp.up_proj.weight": torch.ones(80, 48).to(torch.int8)}, "is torch.int8; weights must be floating"),
    ],
)
def test_weights_that_change_the_model_are_not_passed_over(extra: dict[str, Tensor], message: str) -> None:
    kernels = choose_kernels("reference", "cpu")
    oracle, _ = make_pair("Llama", {}, kernels)
    weights = TransformersWeights(oracle)
    weights.state |= {f"model.{name}": tensor for name, tensor in extra.items()}
    with pytest.raises(ModelError, match=message):
        load_model(weights, kernels, ModelSettings())


def test_weights_that_say_nothing_new_are_passed_over() -> None:
    """The head's copy in a tied model, and the rope tables that old files hold."""
    kernels = choose_kernels("reference", "cpu")
    oracle, _ = make_pair("Llama", {"tie_word_embeddings": True}, kernels)
    weights = TransformersWeights(oracle)
    assert "lm_head.weight" in weights.names()
    weights.state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    model, tokens = load_model(weights, kernels, ModelSettings()), make_text(9)
    torch.testing.assert_close(logits_of(model, tokens, [9]), expected_logits(oracle, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_its_own_is_taken_whatever_the_config_says(dtype: torch.dtype, tmp_path: Path) -> None:
    """transformers ties only where both hold the same numbers."""
    folder = make_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    head = (weights["model.embed_tokens.weight"].flip(0) * 0.5).to(dtype)
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Logits of transformers' own reading of the folder."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = load_model(open_checkpoint(folder), choose_kernels("reference", "cpu"), ModelSettings())
    tokens = make_text(40, vocabulary=300)
    torch.testing.assert_close(logits_of(model, tokens, [40]), expected_logits(oracle, tokens), atol=1e-4, rtol=1e-4)


def test_folders_saved_without_the_head_lack_a_prefix(tmp_path: Path) -> None:
    """AutoModel and sentence-transformers save `layers.0...` for `model.layers.0...`."""
    folder = make_tiny_model(tmp_path / "model")
    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)
    assert "embed_tokens.weight" in load_file(folder / "model.safetensors")
    check_folder(folder)


@pytest.mark.parametrize("theta", [{}, {"rope_theta": 777.0}])
def test_an_older_scaling_counts_beside_the_newer_parameters(theta: dict[str, float], tmp_path: Path) -> None:
    both = {"rope_scaling": LINEAR_BY_2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    folder = make_tiny_model(tmp_path / "model", **both)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config | theta))
    check_folder(folder)


def test_gemma_lays_an_older_scaling_over_its_global_layers() -> None:
    kinds = {name: {"rope_type": "default", "rope_theta": base} for name, base in KIND_BASES.items()}
    config = TINY | GEMMA | {"model_type": "gemma3_text", "rms_norm_eps": 1e-6, "rope_parameters": kinds}
    both = config | {"rope_scaling": LINEAR_BY_2}
    rope, local = read_config(both).ropes
    # Only now: transformers writes into what it is given.
    oracle = transformers.Gemma3TextConfig(**both).rope_parameters
    assert (rope.base, rope.scaling["factor"]) == (500.0, 2.0)
    assert (rope.base, local.base) == (
        oracle["full_attention"]["rope_theta"],
        oracle["sliding_attention"]["rope_theta"],
    )
    assert oracle["full_attention"]["factor"] == 2.0 and "factor" not in {
        **oracle["sliding_attention"],
        **local.scaling,
    }


def test_yarn_stretches_a_context_that_the_config_keeps_as_trained() -> None:
    """Qwen's model cards add the scaling and leave max_position_embeddings alone; others write the stretched length."""
    kept = TINY | {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_parameters": YARN}
    assert [read_config(kept | {"max_position_embeddings": most}).context_length for most in (64, 256, 512)] == [
        256,
        256,
        512,
    ]
    linear = kept | {"rope_parameters": LINEAR_BY_2, "max_position_embeddings": 64}
    assert read_config(linear).context_length == 64
    oracle, _ = make_pair("Qwen3", {"rope_parameters": YARN, "max_position_embeddings": 64}, CPU)
    model = load_model(TransformersWeights(oracle), CPU, ModelSettings(max_context=200))
    tokens = make_text(200)
    torch.testing.assert_close(logits_of(model, tokens, [200]), expected_logits(oracle, tokens), atol=1e-4, rtol=1e-4)


def test_every_family_has_a_case() -> None:
    suffixes = {"gemma3_text": "gemma3"}
    assert {suffixes.get(family, family) for family in FAMILIES} == {name.lower() for name, _ in CASES}


@pytest.mark.parametrize(("family", "changes"), CASES, ids=CASE_IDS)
def test_older_configs_read_the_same(family: str, changes: dict[str, Any]) -> None:
    """Before transformers 5 the base and the scaling of the rotary embedding were fields of their own."""
    oracle, model = make_pair(family, changes, choose_kernels("reference", "cpu"))
    config = dict(oracle.config.to_dict())
    parameters = dict(config.pop("rope_parameters"))
    if family == "Gemma3":
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = dict(parameters["full_attention"])
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = {"type": parameters.pop("rope_type"), **parameters}
    older, newer = read_config(config), model.config
    assert replace(older, ropes=()) == replace(newer, ropes=())
    for ours, theirs in zip(older.ropes, newer.ropes, strict=True):
        assert torch.equal(rope_frequencies(ours, 16)[0], rope_frequencies(theirs, 16)[0])
        assert rope_frequencies(ours, 16)[1] == rope_frequencies(theirs, 16)[1]


def test_fields_that_a_config_leaves_out_are_as_transformers_has_them() -> None:
    shapes = {name: value for name, value in TINY.items() if name != "tie_word_embeddings"} | {"rms_norm_eps": 1e-6}
    gemma_shapes = shapes | {"model_type": "gemma3_text", "sliding_window": 12, "query_pre_attn_scalar": 24}
    gemma = read_config(gemma_shapes)
    assert [rope.base for rope in gemma.ropes] == [1e6, 1e4]
    kinds = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    assert [rope.base for rope in read_config(gemma_shapes | {"rope_parameters": kinds}).ropes] == [1e6, 1e4]
    assert (gemma.activation, gemma.tied, gemma.windows) == ("gelu_tanh", True, (12, 12, 12))
    assert read_config(shapes | {"model_type": "mistral"}).windows == (4096,) * 3
    assert read_config(shapes | {"model_type": "qwen3", "use_sliding_window": True}).windows == (None,) * 3
    llama3 = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
    implied = read_config(shapes | {"model_type": "llama", "rope_parameters": llama3}).ropes[0]
    assert implied.scaling["original_max_position_embeddings"] == 256


def test_factors_stand_for_the_scaling_they_were_made_from() -> None:
    """GGUF keeps Llama 3's scaling as one divisor a frequency."""
    scaled, _ = rope_frequencies(RopeSpec(5e5, LLAMA3), 16)
    plain, _ = rope_frequencies(RopeSpec(5e5, {"rope_type": "default"}), 16)
    factors = (plain / scaled).tolist()
    assert len(set(factors)) > 2
    found, factor = rope_frequencies(RopeSpec(5e5, {"rope_type": "factors", "factors": factors}), 16)
    torch.testing.assert_close(found, scaled)
    assert factor == 1.0


def test_cache_groups_are_of_one_size_and_one_window() -> None:
    """Gemma 3 270M: 15 sliding and 3 global layers are 6 groups of 3."""
    windows = [None if (layer + 1) % 6 == 0 else 512 for layer in range(18)]
    layout = CacheLayout.from_windows(windows, 32)
    assert [len(group.layers) for group in layout.groups] == [3] * 6
    places = [layout.place(layer) for layer in range(18)]
    assert len(set(places)) == 18
    for layer, (group, index) in enumerate(places):
        assert layout.groups[group].layers[index] == layer and layout.groups[group].window == windows[layer]
    with pytest.raises(ValueError, match="layer 18 is in no cache group"):
        layout.place(18)


def test_max_context_cannot_pass_the_models_own() -> None:
    oracle, _ = make_pair("Llama", {}, choose_kernels("reference", "cpu"))
    with pytest.raises(InputError, match="above the 256 tokens"):
        load_model(TransformersWeights(oracle), choose_kernels("reference", "cpu"), ModelSettings(max_context=300))
