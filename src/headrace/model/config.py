"""What a decoder looks like, read from a checkpoint's config in Hugging Face's shape. Knows no tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.core import ModelError
from headrace.kernels.base import Activation

Config = Mapping[str, Any]
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of one kind of layer: base, and how long contexts stretch it (`scaling` as in the config)."""

    base: float
    scaling: Config


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder's shapes and the differences between families, as data.

    windows        per layer: tokens that a query sees, itself included; None for all
    ropes          the kinds of rotary embedding; rope_of_layer says which one a layer uses
    norm_offset    norm weights are stored as w and act as norm_offset + w
    post_norms     attention and feed-forward outputs are normed before they join the residual
    query_scale    multiplies q.k
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    context_length: int
    norm_eps: float
    windows: tuple[int | None, ...]
    ropes: tuple[RopeSpec, ...]
    rope_of_layer: tuple[int, ...]
    query_scale: float
    activation: Activation = "silu"
    tied: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None


def read_field(config: Config, name: str, kind: Callable[[Any], Any] = int) -> Any:
    """A number that the config must have. Raises ModelError naming the field."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"the model's config needs a number for {name!r}, found {value!r}")
    return kind(value)


def read_shapes(config: Config) -> dict[str, Any]:
    """The fields that every family has under the same names, as keywords of ModelConfig, full attention everywhere."""
    hidden, heads = read_field(config, "hidden_size"), read_field(config, "num_attention_heads")
    kv_heads = read_field(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
    layers = read_field(config, "num_hidden_layers")
    if kv_heads < 1 or heads % kv_heads:
        raise ModelError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})")
    head_size = read_field(config, "head_dim") if config.get("head_dim") else hidden // heads
    if layers < 1 or head_size < 2 or head_size % 2:
        raise ModelError(f"num_hidden_layers ({layers}) must be positive and head_dim ({head_size}) even")
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise ModelError(f"unsupported activation {activation!r}; supported are {', '.join(ACTIVATIONS)}")
    return {
        "vocab_size": read_field(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": read_field(config, "intermediate_size"),
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": head_size,
        "context_length": read_field(config, "max_position_embeddings"),
        "norm_eps": read_field(config, "rms_norm_eps", float),
        "windows": (None,) * layers,
        "ropes": (read_rope(config),),
        "rope_of_layer": (0,) * layers,
        "query_scale": head_size**-0.5,
        "activation": ACTIVATIONS[activation],
        "tied": bool(config.get("tie_word_embeddings", False)),
    }


def read_rope(config: Config, kind: str | None = None, base_field: str = "rope_theta") -> RopeSpec:
    """Base and scaling, in the older shape (rope_theta, rope_scaling) or the newer (rope_parameters, by layer kind)."""
    parameters = config.get("rope_parameters") or {}
    if kind is not None and isinstance(parameters.get(kind), Mapping):
        parameters = parameters[kind]
    base = parameters.get("rope_theta") or config.get(base_field) or 10000.0
    scaling = dict(parameters) if parameters else dict(config.get("rope_scaling") or {})
    scaling["rope_type"] = scaling.get("rope_type") or scaling.get("type") or "default"
    return RopeSpec(float(base), scaling | {"original_context": config.get("max_position_embeddings")})


def read_windows(config: Config, layers: int, window: int | None) -> tuple[int | None, ...]:
    """Windows by `layer_types`, where the config lists them; else every layer has this window."""
    kinds = config.get("layer_types")
    if kinds is None:
        return (window,) * layers
    if len(kinds) != layers:
        raise ModelError(f"layer_types lists {len(kinds)} layers and num_hidden_layers is {layers}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
