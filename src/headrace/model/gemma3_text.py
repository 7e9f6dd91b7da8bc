"""Gemma 3 (arXiv 2503.19786), its text part: mostly sliding-window layers with a rotary base of their own, every
sixth one global; norms before and after each part; weights of norms stored less one; scaled embeddings."""

from __future__ import annotations

from headrace.model.config import Config, ModelConfig, RopeSpec, read_field, read_rope, read_shapes, read_windows


def read_config(config: Config) -> ModelConfig:
    shapes = read_shapes(config)
    layers = shapes["layers"]
    pattern = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    kinds = config.get("layer_types") or [
        "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)
    ]
    windows = read_windows({"layer_types": kinds}, layers, read_field(config, "sliding_window"))
    bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        **shapes
        | {
            "tied": bool(config.get("tie_word_embeddings", True)),
            "windows": windows,
            "ropes": (read_rope(config, "full_attention"), read_local_rope(config)),
            "rope_of_layer": tuple(int(window is not None) for window in windows),
            "query_scale": read_field(config, "query_pre_attn_scalar", float) ** -0.5,
        },
        attention_bias=bias,
        output_bias=bias,
        query_key_norm=True,
        post_norms=True,
        norm_offset=1.0,
        embedding_scale=shapes["hidden_size"] ** 0.5,
        attention_soft_cap=config.get("attn_logit_softcapping"),
        logit_soft_cap=config.get("final_logit_softcapping"),
    )


def read_local_rope(config: Config) -> RopeSpec:
    """Sliding-window layers: base 10,000 where the config does not say; long-context scaling is for global layers."""
    if isinstance((config.get("rope_parameters") or {}).get("sliding_attention"), dict):
        return read_rope(config, "sliding_attention")
    return RopeSpec(float(config.get("rope_local_base_freq") or 10000.0), {"rope_type": "default"})
