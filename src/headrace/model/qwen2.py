"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on queries, keys and values; a window in the upper layers if asked."""

from __future__ import annotations

from headrace.model.config import Config, ModelConfig, read_shapes, read_windows


def read_config(config: Config) -> ModelConfig:
    shapes = read_shapes(config)
    return ModelConfig(**shapes | {"windows": upper_windows(config, shapes["layers"])}, attention_bias=True)


def upper_windows(config: Config, layers: int) -> tuple[int | None, ...]:
    """The window from layer max_window_layers on, if use_sliding_window is set; layer_types wins where it is there."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    if window is None or config.get("layer_types") is not None:
        return read_windows(config, layers, window)
    first = config.get("max_window_layers", layers)
    return tuple(window if layer >= first else None for layer in range(layers))
