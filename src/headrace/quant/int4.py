"""4-bit weights, 8-bit activations (W4A8): each group of neighbouring inputs of an output has a scale and a minimum.

Blocks that a checkpoint stores in this form (GGUF's Q4_0 and Q4_1) are multiplied as they are. Others are rounded here
to the nearest of 16 levels between the group's least and largest weight. Source of the arithmetic: MARLIN (arXiv
2408.11743), section 3, with integer products in place of half-precision ones; activations as in `int8`, in groups that
the weights' own make cheap. Logits are computed in int8: the head's errors meet nothing after them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from headrace.kernels.matrix import Matrix
from headrace.quant.int8 import Int8

LEVELS = 15
WEIGHT_GROUP = 32
INPUT_GROUP = 64


class Int4:
    """See the module. weight_group is 32 to 128, a multiple of 16; input_group is a multiple of it."""

    dtype = torch.bfloat16
    arithmetic = "int8"

    def __init__(self, weight_group: int = WEIGHT_GROUP, input_group: int = INPUT_GROUP) -> None:
        self.weight_group = weight_group
        self.input_group = max(input_group, weight_group)

    @property
    def head(self) -> Int8:
        return Int8()

    def store(self, weight: Tensor) -> Matrix:
        return self.describe(*round_groups(weight.float(), self.weight_group))

    def adopt(self, values: Tensor, scales: Tensor, minimums: Tensor) -> Matrix | None:
        if values.shape[1] != scales.shape[1] * self.weight_group:
            return None
        return self.describe(values, scales, minimums)

    def describe(self, values: Tensor, scales: Tensor, minimums: Tensor) -> Matrix:
        """4-bit values with these groups as a matrix."""
        return Matrix(values, scales, minimums, self.weight_group, self.input_group)


def round_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values uint8 [out, in] from 0 to 15, scales and minimums float16 [out, groups], of a float32 weight [out, in]."""
    out, columns = weight.shape
    parts = functional.pad(weight, (0, -columns % group), mode="replicate").view(out, -1, group)
    scales, least = measure_groups(parts)
    steps = (parts - least.float()[..., None]) / scales.float().where(scales > 0, 1)[..., None]
    values = steps.round().clamp(0, LEVELS).to(torch.uint8).view(out, -1)[:, :columns]
    return values.contiguous(), scales, least


def measure_groups(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum float16 [...] of groups of weights [..., group]: 16 levels from the least to the largest."""
    least = parts.amin(-1).half()
    return ((parts.amax(-1) - least.float()) / LEVELS).half(), least


def dequantize_groups(values: Tensor, scales: Tensor, minimums: Tensor, group: int) -> Tensor:
    """The weight float32 [out, in] that `round_groups` made these of."""
    columns = values.shape[1]
    wide, least = (each.float().repeat_interleave(group, dim=1)[:, :columns] for each in (scales, minimums))
    return values.float() * wide + least
