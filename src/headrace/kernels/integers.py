"""What products with integer weights mean, in plain torch and float64: the oracle of faster ones."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.matrix import Matrix


def round_activations(x: Tensor, group: int) -> Tensor:
    """x [T, in] as it is after rounding to 8 bits in groups of inputs, float64.

    Scales and factors are float32's, as in faster kernels: others would take ties to another side.
    """
    rounded = []
    for part in torch.split(x.float(), group, dim=1):
        top = part.abs().amax(-1, keepdim=True)
        # 127 / top would be 127 times its reciprocal in torch, rounded twice.
        factor = torch.where(top > 0, torch.full_like(top, 127) / top, 0)
        rounded.append((part.double() * factor).round() * (top / 127))
    return torch.cat(rounded, dim=1)


def dequantize(matrix: Matrix) -> Tensor:
    """An integer matrix's weights [out, in], float64, as they meet inputs that have been scaled."""
    assert matrix.scales is not None
    values, scales = matrix.values.double(), matrix.scales.double()
    if matrix.minimums is None:
        return values * scales[:, None]
    group, columns = matrix.weight_group, values.shape[1]
    wide, least = (each.repeat_interleave(group, dim=1)[:, :columns] for each in (scales, matrix.minimums.double()))
    return values * wide + least
