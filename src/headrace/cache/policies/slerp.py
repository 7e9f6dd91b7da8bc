"""MiniCache's arithmetic (arXiv 2405.14366, section 4): one direction for two vectors, each with its own length.

Knows nothing of caches. Vectors are float32 [..., width].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Sines below this divide badly: such vectors are one line, and weighting them straight is the same.
SMALL_SINE = 1e-4


@dataclass(frozen=True, slots=True)
class Merged:
    """direction [..., width] of length 1; first, second [...]: the lengths; distance [...]: the angle over pi."""

    direction: Tensor
    first: Tensor
    second: Tensor
    distance: Tensor


def merge(first: Tensor, second: Tensor, share: float) -> Merged:
    """The direction a `share` of the way from the first vectors' to the second ones', along the great circle."""
    lengths = [each.norm(dim=-1) for each in (first, second)]
    ones = [each / length.clamp(min=1e-30)[..., None] for each, length in zip((first, second), lengths, strict=True)]
    angle = (ones[0] * ones[1]).sum(-1).clamp(-1, 1).acos()
    sine = angle.sin()
    straight = sine < SMALL_SINE
    safe = torch.where(straight, 1.0, sine)
    weights = [torch.where(straight, part, (part * angle).sin() / safe)[..., None] for part in (1 - share, share)]
    middle = weights[0] * ones[0] + weights[1] * ones[1]
    # Opposite vectors may cancel: then the second one's direction is as good as any.
    middle = torch.where(middle.norm(dim=-1, keepdim=True) < SMALL_SINE, ones[1], middle)
    return Merged(normalise(middle), lengths[0], lengths[1], angle / torch.pi)


def normalise(directions: Tensor) -> Tensor:
    """The same with length 1; zeros stay zeros."""
    lengths: Tensor = directions.norm(dim=-1, keepdim=True)
    return directions / lengths.clamp(min=1e-30)


def choose_distant(distances: Tensor, count: int) -> Tensor:
    """The `count` tokens of each block [n, tokens] whose vectors are farthest apart: int64 [n, count]."""
    return distances.argsort(dim=-1, descending=True, stable=True)[:, :count]


def choose_near(distances: Tensor, count: int, share: float) -> Tensor:
    """The tokens of each block [n, tokens] whose distance is in the lowest `share` of the block's range, nearest first
    and at most `count`: int64 [n, count], the nearest repeated where there are fewer."""
    ranked = distances.argsort(dim=-1, stable=True)[:, :count]
    least, most = distances.amin(-1, keepdim=True), distances.amax(-1, keepdim=True)
    kept = distances.gather(1, ranked) <= least + (most - least) * share
    return torch.where(kept, ranked, ranked[:, :1])
