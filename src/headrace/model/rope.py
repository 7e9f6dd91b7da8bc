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
        exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
        frequencies, factor = scale_frequencies(1.0 / spec.base**exponents, spec, head_size)
        angles = torch.outer(torch.arange(context_length, dtype=torch.float32), frequencies)
        self.cos = (angles.cos() * factor).to(device)
        self.sin = (angles.sin() * factor).to(device)


def scale_frequencies(frequencies: Tensor, spec: RopeSpec, head_size: int) -> tuple[Tensor, float]:
    """Frequencies [head size / 2] after scaling, and what multiplies cos and sin.

    Raises ModelError for a kind of scaling that is not supported or lacks a number it needs.
    """
    kind = spec.scaling["rope_type"]
    if kind == "default":
        return frequencies, 1.0
    if kind not in SCALINGS:
        raise ModelError(f"unsupported rope scaling {kind!r}; supported are default, {', '.join(SCALINGS)}")
    try:
        return SCALINGS[kind](frequencies, spec, head_size)
    except (KeyError, TypeError) as error:
        raise ModelError(f"the rope scaling {kind!r} in the model's config lacks or misstates {error}") from None


def scale_linear(frequencies: Tensor, spec: RopeSpec, head_size: int) -> tuple[Tensor, float]:
    return frequencies / spec.scaling["factor"], 1.0


def scale_llama3(frequencies: Tensor, spec: RopeSpec, head_size: int) -> tuple[Tensor, float]:
    """Llama 3.1: long waves are stretched, short ones kept, those between blended."""
    scaling, context = spec.scaling, spec.scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * math.pi / frequencies
    stretched = torch.where(waves > context / low, frequencies / scaling["factor"], frequencies)
    blend = (context / waves - low) / (high - low)
    between = (1 - blend) * stretched / scaling["factor"] + blend * stretched
    medium = ~(waves < context / high) & ~(waves > context / low)
    return torch.where(medium, between, stretched), 1.0


def scale_yarn(frequencies: Tensor, spec: RopeSpec, head_size: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, section 3): a ramp over dimensions between stretched and kept frequencies."""
    scaling = spec.scaling
    context = scaling.get("original_max_position_embeddings") or scaling["original_context"]
    factor = scaling.get("factor") or scaling["original_context"] / context

    def dimension(rotations: float) -> float:
        return head_size * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(spec.base))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
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
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return grow(scaling["mscale"]) / grow(scaling["mscale_all_dim"])
    return grow(1.0)


def divide_by_factors(frequencies: Tensor, spec: RopeSpec, head_size: int) -> tuple[Tensor, float]:
    """One divisor for each frequency, as GGUF files keep Llama 3's scaling."""
    factors = torch.tensor(spec.scaling["factors"], dtype=torch.float32)
    if factors.shape != frequencies.shape:
        raise ModelError(f"the rope scaling lists {len(factors)} factors for {len(frequencies)} frequencies")
    return frequencies / factors, 1.0


SCALINGS: dict[str, Callable[[Tensor, RopeSpec, int], tuple[Tensor, float]]] = {
    "linear": scale_linear,
    "llama3": scale_llama3,
    "yarn": scale_yarn,
    "factors": divide_by_factors,
}
