"""Weights in full precision: float32, or bfloat16 with float32 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.matrix import Matrix


class FullPrecision:
    """Weights in the dtype of the activations."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.arithmetic = "fp32" if dtype == torch.float32 else "bf16"

    @property
    def head(self) -> FullPrecision:
        return self

    def store(self, weight: Tensor) -> Matrix:
        return Matrix(weight.to(self.dtype, copy=True))

    def adopt(self, values: Tensor, scales: Tensor, minimums: Tensor) -> None:
        return None
