"""Llama 2 and 3 (arXiv 2302.13971, 2407.21783), SmolLM2 and whatever else is built like them."""

from __future__ import annotations

from headrace.model.config import Config, ModelConfig, read_shapes


def read_config(config: Config) -> ModelConfig:
    bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        **read_shapes(config), attention_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias", False))
    )
