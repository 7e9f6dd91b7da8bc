"""Rotary position embedding (RoFormer, arXiv 2104.09864) and the ways in which long contexts stretch it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from headrace.core import ModelError
from headrace.model.config import RopeSpec

Scaling = Mapping[str, Any]


class RotaryTable:
    """cos and sin of every position, float32 [context, head size / 2], made once and read by index."""

    def __init__(self, spec: RopeSpec, head_size: int, context_length: int, device: str) -> None:
        frequencies, factor = rope_frequencies(spec, head_size)
        angles = torch.outer(torch.arange(context_length, dtype=torch.float32), frequencies)
        self.cos = (angles.cos() * factor).to(device)
        self.sin = (angles.sin() * factor).to(device)


def rope_frequencies(spec: RopeSpec, head_size: int) -> tuple[Tensor, float]:
    """Angles a position, float32 [head size / 2], after scaling, and what multiplies cos and sin.

    Raises ModelError for a kind of scaling that is not supported or lacks a number it needs.
    """
    frequencies = 1.0 / spec.base ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    kind = spec.scaling["rope_type"]
    if kind == "default":
        return frequencies, 1.0
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ModelError(f"unsupported rope scaling {kind!r}; supported are default, {', '.join(SCALINGS)}")
    return SCALINGS[kind](frequencies, spec, head_size)


def stretched_context(spec: RopeSpec) -> float:
    """Tokens that YaRN stretches the trained context to, 0 for other kinds: Qwen's configs with YaRN keep
    max_position_embeddings at what the model was trained for."""
    if spec.scaling["rope_type"] != "yarn" or spec.scaling.get("factor") is None:
        return 0
    return read_factor(spec.scaling, "factor") * read_factor(spec.scaling, "original_max_position_embeddings")


def read_factor(scaling: Scaling, name: str, default: float | None = None) -> float:
    """A number above 0 that the scaling needs. Raises ModelError naming it."""
    value = default if scaling.get(name) is None else scaling[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(f"rope scaling {scaling['rope_type']!r} needs a number above 0 for {name!r}, found {value!r}")
    return value


def scale_linear(frequencies: Tensor, spec: RopeSpec, head_size: int) -> tuple[Tensor, float]:
    """Position interpolation (arXiv 2306.15595): every wave is stretched alike."""
    return frequencies / read_factor(spec.scaling, "factor"), 1.0


def scale_llama3(frequencies: Tensor, spec: RopeSpec, head_size: int) -> tuple[Tensor, float]:
    """Llama 3.1: long waves are stretched, short ones kept, those between blended."""
    factor, context, low, high = (
        read_factor(spec.scaling, name)
        for name in ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    if low >= high:
        raise ModelError(f"rope scaling 'llama3' needs low_freq_factor ({low}) below high_freq_factor ({high})")
    waves = 2 * math.pi / frequencies
    stretched = torch.where(waves > context / low, frequencies / factor, frequencies)
    blend = (context / waves - low) / (high - low)
    between = (1 - blend) * stretched / factor + blend * stretched
    medium = ~(waves < context / high) & ~(waves > context / low)
    return torch.where(medium, between, stretched), 1.0


def scale_yarn(frequencies: Tensor, spec: RopeSpec, head_size: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, section 3): a ramp over dimensions between stretched and kept frequencies."""
    scaling = spec.scaling
    context = read_factor(scaling, "original_max_position_embeddings")
    stretch = read_factor(scaling, "max_position_embeddings") / context
    factor = read_factor(scaling, "factor", stretch if stretch > 1 else None)

    def dimension(rotations: float) -> float:
        return head_size * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(spec.base))

    low, high = dimension(read_factor(scaling, "beta_fast", 32)), dimension(read_factor(scaling, "beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(head_size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    blended = frequencies / factor * ramp + frequencies * (1 - ramp)
    return blended, yarn_attention_factor(scaling, factor)


def yarn_attention_factor(scaling: Scaling, factor: float) -> float:
    """What multiplies cos and sin: as given, or from the scale (and DeepSeek's mscale where it is set)."""

    def grow(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return read_factor(scaling, "attention_factor")
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return grow(read_factor(scaling, "mscale")) / grow(read_factor(scaling, "mscale_all_dim"))
    return grow(1.0)


def divide_by_factors(frequencies: Tensor, spec: RopeSpec, head_size: int) -> tuple[Tensor, float]:
    """One divisor for each frequency, as GGUF files keep Llama 3's scaling."""
    factors = spec.scaling.get("factors") or []
    if len(factors) != len(frequencies):
        raise ModelError(f"the rope scaling lists {len(factors)} factors for {len(frequencies)} frequencies")
    return frequencies / torch.tensor(factors, dtype=torch.float32), 1.0


SCALINGS: dict[str, Callable[[Tensor, RopeSpec, int], tuple[Tensor, float]]] = {
    "linear": scale_linear,
    "llama3": scale_llama3,
    "yarn": scale_yarn,
    "factors": divide_by_factors,
}
