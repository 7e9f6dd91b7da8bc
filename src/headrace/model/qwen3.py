"""Qwen3 (arXiv 2505.09388): queries and keys are normed head by head; heads of their own size."""

from __future__ import annotations

from headrace.model.config import Config, ModelConfig, read_shapes
from headrace.model.qwen2 import upper_windows


def read_config(config: Config) -> ModelConfig:
    shapes = read_shapes(config)
    bias = bool(config.get("attention_bias", False))
    windows = upper_windows(config, shapes["layers"])
    return ModelConfig(**shapes | {"windows": windows}, query_key_norm=True, attention_bias=bias, output_bias=bias)
