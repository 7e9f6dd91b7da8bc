"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on queries, keys and values; a window in the upper layers if asked."""

from __future__ import annotations

from headrace.model.config import Config, ModelConfig, read_shapes, read_whole, read_windows

# What transformers takes where a config does not name the field.
DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}


def read_config(config: Config) -> ModelConfig:
    shapes = read_shapes(config)
    return ModelConfig(**shapes | {"windows": upper_windows(config, shapes["layers"])}, attention_bias=True)


def upper_windows(config: Config, layers: int) -> tuple[int | None, ...]:
    """The window from layer max_window_layers on, if use_sliding_window is set; layer_types wins where it is there."""
    config = DEFAULTS | dict(config)
    slides = config.get("use_sliding_window") and config["sliding_window"] is not None
    window = read_whole(config, "sliding_window") if slides else None
    if window is None or config.get("layer_types") is not None:
        return read_windows(config, layers, window)
    return tuple(window if layer >= config["max_window_layers"] else None for layer in range(layers))
