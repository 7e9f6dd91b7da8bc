"""What a decoder looks like, read from a checkpoint's config in Hugging Face's shape. Knows no tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace.core import ModelError
from headrace.kernels.matrix import Activation

Config = Mapping[str, Any]
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
LAYER_KINDS = ("full_attention", "sliding_attention")
# More than any model has of anything; a damaged config must not fill the memory before its tensors are looked at.
MOST = 2**24


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of one kind of layer: base, and how long contexts stretch it.

    `scaling` is as in the config, plus its rope_type, max_position_embeddings and original_max_position_embeddings.
    """

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


def read_whole(config: Config, name: str) -> int:
    """A whole number above 0 that the config must have. Raises ModelError naming the field."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf or value != int(value):
        raise ModelError(f"the model's config needs a whole number above 0 for {name!r}, found {value!r}")
    return int(value)


def read_size(config: Config, name: str) -> int:
    """A whole number above 0 that memory is laid out by. Raises ModelError naming the field."""
    return check_size(read_whole(config, name), name)


def check_size(value: int, name: str) -> int:
    """The number itself. Raises ModelError, naming the field, where it is larger than any model's."""
    if value > MOST:
        raise ModelError(f"the model's config says {value:.3g} for {name!r}; more than {MOST:,} is not supported")
    return value


def read_number(config: Config, name: str) -> float:
    """A number above 0 that the config must have. Raises ModelError naming the field."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(f"the model's config needs a number above 0 for {name!r}, found {value!r}")
    return float(value)


def read_optional(config: Config, name: str) -> float | None:
    """A number above 0, or None where the config has none."""
    return None if config.get(name) is None else read_number(config, name)


def read_shapes(config: Config) -> dict[str, Any]:
    """The fields that every family has under the same names, as keywords of ModelConfig, full attention everywhere."""
    hidden, heads = read_size(config, "hidden_size"), read_size(config, "num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else read_size(config, "num_key_value_heads")
    layers = read_size(config, "num_hidden_layers")
    if heads % kv_heads:
        raise ModelError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})")
    if config.get("head_dim") is None and hidden % heads:
        raise ModelError(f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}) without head_dim")
    head_size = hidden // heads if config.get("head_dim") is None else read_size(config, "head_dim")
    if head_size % 2:
        raise ModelError(f"head_dim ({head_size}) must be even")
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ModelError(f"unsupported activation {activation!r}; supported are {', '.join(ACTIVATIONS)}")
    return {
        "vocab_size": read_size(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": read_size(config, "intermediate_size"),
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": head_size,
        "context_length": read_size(config, "max_position_embeddings"),
        "norm_eps": read_number(config, "rms_norm_eps"),
        "windows": (None,) * layers,
        "ropes": (read_rope(config),),
        "rope_of_layer": (0,) * layers,
        "query_scale": head_size**-0.5,
        "activation": ACTIVATIONS[activation],
        "tied": bool(config.get("tie_word_embeddings", False)),
    }


def read_rope(config: Config, kind: str | None = None, base_field: str = "rope_theta") -> RopeSpec:
    """Base and scaling, in the older shape (rope_theta, rope_scaling) or the newer (rope_parameters, by layer kind).

    Where a config has both, the older counts alone, as in transformers: people add it to stretch the context. Raises
    ModelError for what is in neither shape, and for heads that are rotated in part only.
    """
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = config.get(field) or {}
    if kind is not None and isinstance(scaling, Mapping) and scaling.get(kind) is not None:
        scaling = scaling[kind]
    if not isinstance(scaling, Mapping):
        raise ModelError(f"the model's config needs an object for {field!r}, found {scaling!r}")
    scaling = {name: value for name, value in scaling.items() if value is not None}
    if "rope_theta" in scaling:
        base = read_number(scaling, "rope_theta")
    else:
        base = read_number({base_field: 10000.0} | dict(config), base_field)
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ModelError(f"unsupported partial_rotary_factor {partial!r}; heads are rotated as a whole")
    # The config's own field wins over the scaling's; without either the model was trained at its full length.
    trained = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    filled = {
        "rope_type": scaling.get("rope_type") or scaling.get("type") or "default",
        "max_position_embeddings": config.get("max_position_embeddings"),
        "original_max_position_embeddings": trained or config.get("max_position_embeddings"),
    }
    return RopeSpec(base, scaling | filled)


def read_windows(config: Config, layers: int, window: int | None) -> tuple[int | None, ...]:
    """Windows by `layer_types`, where the config lists them; else every layer has this window.

    Raises ModelError for a kind of layer that is not supported, or a sliding one without a window.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return (window,) * layers
    if not isinstance(kinds, list | tuple):
        raise ModelError(f"the model's config needs a list for 'layer_types', found {kinds!r}")
    if len(kinds) != layers:
        raise ModelError(f"layer_types lists {len(kinds)} layers and num_hidden_layers is {layers}")
    for kind in kinds:
        if kind not in LAYER_KINDS:
            raise ModelError(f"unsupported kind {kind!r} in layer_types; supported are {', '.join(LAYER_KINDS)}")
        if kind == "sliding_attention" and window is None:
            raise ModelError("layer_types lists sliding_attention, and the model's config sets no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
