"""Gemma 3 (arXiv 2503.19786), its text part: mostly sliding-window layers with a rotary base of their own, every
sixth one global; norms before and after each part; weights of norms stored less one; scaled embeddings."""

from __future__ import annotations

from typing import Any

from headrace.core import ModelError
from headrace.model.config import (
    Config,
    ModelConfig,
    RopeSpec,
    read_number,
    read_optional,
    read_rope,
    read_shapes,
    read_whole,
    read_windows,
)

# What transformers takes where a config does not name the field.
DEFAULTS: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e6, "tie_word_embeddings": True}


def read_config(config: Config) -> ModelConfig:
    config = DEFAULTS | dict(config)
    if config.get("use_bidirectional_attention"):
        raise ModelError("unsupported use_bidirectional_attention: tokens must see what is before them only")
    shapes = read_shapes(config)
    layers = shapes["layers"]
    name = "_sliding_window_pattern" if "_sliding_window_pattern" in config else "sliding_window_pattern"
    pattern = read_whole({name: 6} | dict(config), name)
    kinds = config.get("layer_types") or [
        "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)
    ]
    windows = read_windows({"layer_types": kinds}, layers, read_whole(config, "sliding_window"))
    bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        **shapes
        | {
            "windows": windows,
            "ropes": (read_global_rope(config), read_local_rope(config)),
            "rope_of_layer": tuple(int(window is not None) for window in windows),
            "query_scale": read_number(config, "query_pre_attn_scalar") ** -0.5,
        },
        attention_bias=bias,
        output_bias=bias,
        query_key_norm=True,
        post_norms=True,
        norm_offset=1.0,
        embedding_scale=shapes["hidden_size"] ** 0.5,
        attention_soft_cap=read_optional(config, "attn_logit_softcapping"),
        logit_soft_cap=read_optional(config, "final_logit_softcapping"),
    )


def read_global_rope(config: Config) -> RopeSpec:
    """Where a config has both shapes, the older is laid over the newer's part for these layers, as in transformers."""
    older, newer = config.get("rope_scaling"), config.get("rope_parameters")
    if older and newer:
        joined = dict(newer.get("full_attention") or {}) | dict(older)
        config = dict(config) | {"rope_parameters": {"full_attention": joined}, "rope_scaling": None}
    return read_rope(config, "full_attention")


def read_local_rope(config: Config) -> RopeSpec:
    """Sliding-window layers: base 10,000 where the config does not say; long-context scaling is for global layers."""
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {"rope_type": "default"}
    return read_rope(dict(config) | {"rope_parameters": local, "rope_scaling": None}, base_field="rope_local_base_freq")
