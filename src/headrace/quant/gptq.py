"""GPTQ (arXiv 2210.17323, algorithm 1): round a weight column by column, each time moving the columns that are still to
come so that the product over typical inputs changes least. Not reordered; a group's scale and minimum are those of its
weights as they have been moved when its turn comes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.quant.int4 import LEVELS, measure_groups

# Of the mean of the diagonal, added to it: typical inputs are few, and some never occur.
DAMPING = 0.01


def round_by_gptq(weight: Tensor, gram: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values uint8 [out, in], scales and minimums float16 [out, groups], of a weight float32 [out, in].

    gram is the sum of x x^T over typical inputs, [in, in].
    """
    left = weight.float().clone()
    factor = factor_inverse(gram)
    values = torch.empty_like(left, dtype=torch.uint8)
    scales, minimums = [], []
    for start in range(0, left.shape[1], group):
        end = min(start + group, left.shape[1])
        scale, minimum = measure_groups(left[:, start:end])
        errors = torch.empty_like(left[:, start:end])
        step, least = scale.float().where(scale > 0, 1), minimum.float()
        for column in range(start, end):
            now = left[:, column]
            rounded = ((now - least) / step).round().clamp(0, LEVELS)
            values[:, column] = rounded.to(torch.uint8)
            error = (now - (rounded * scale.float() + least)) / factor[column, column]
            left[:, column + 1 : end] -= torch.outer(error, factor[column, column + 1 : end])
            errors[:, column - start] = error
        left[:, end:] -= errors @ factor[start:end, end:]
        scales.append(scale)
        minimums.append(minimum)
    return values, torch.stack(scales, 1), torch.stack(minimums, 1)


def factor_inverse(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse, float32 [in, in]."""
    wide = gram.double()
    mean = float(wide.diagonal().mean())
    damped = wide + torch.eye(len(wide), dtype=torch.float64) * (DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
