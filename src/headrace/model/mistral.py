"""Mistral (arXiv 2310.06825): Llama with, in its first versions, a sliding window in every layer."""

from __future__ import annotations

from headrace.model.config import Config, ModelConfig, read_shapes, read_whole, read_windows

# What transformers takes where a config does not name the field; null is no window.
DEFAULTS = {"sliding_window": 4096}


def read_config(config: Config) -> ModelConfig:
    config = DEFAULTS | dict(config)
    shapes = read_shapes(config)
    window = None if config["sliding_window"] is None else read_whole(config, "sliding_window")
    return ModelConfig(**shapes | {"windows": read_windows(config, shapes["layers"], window)})
