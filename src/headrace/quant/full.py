"""Weights in full precision: float32, or bfloat16 with float32 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.base import Kernels, PackedWeight


class Linear:
    """y = x W^T + b with a weight that a kernel has laid out for itself.

    The narrow interface of every weight format: made from a float weight [out, in], called with x [T, in].
    """

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.kernels = kernels
        self.weight: PackedWeight = kernels.pack(weight.to(dtype))
        self.bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
