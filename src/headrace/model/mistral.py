"""Mistral (arXiv 2310.06825): Llama with, in its first versions, a sliding window in every layer."""

from __future__ import annotations

from headrace.model.config import Config, ModelConfig, read_shapes, read_windows


def read_config(config: Config) -> ModelConfig:
    shapes = read_shapes(config)
    return ModelConfig(**shapes | {"windows": read_windows(config, shapes["layers"], config.get("sliding_window"))})
