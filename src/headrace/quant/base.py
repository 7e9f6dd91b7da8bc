"""How weight matrices are stored: the interface of every number format."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, Self

import torch
from torch import Tensor

from headrace.kernels.base import Activation, Kernels, Matrix, PackedWeight
from headrace.meter.operations import Product


class Quantization(Protocol):
    """A number format of weight matrices."""

    dtype: torch.dtype
    """Of activations and the KV cache beside such weights: float32 or bfloat16."""

    arithmetic: str
    """Of the products: fp32, bf16 or int8, whose peaks they are measured against."""

    def store(self, weight: Tensor) -> Matrix:
        """A floating-point weight [out, in] in this format; the argument is left as it is."""
        ...


class Linear:
    """y = x W^T + b, with a weight that the kernels have laid out for themselves. format is that of the arithmetic."""

    def __init__(self, kernels: Kernels, weight: PackedWeight, format: str) -> None:
        self.kernels = kernels
        self.weight = weight
        self.format = format

    @classmethod
    def store(
        cls,
        kernels: Kernels,
        format: Quantization,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: Activation | None = None,
    ) -> Self:
        """From a floating-point weight [out, in] and a bias [out]."""
        bias = None if bias is None else bias.float()
        matrix = replace(format.store(weight), bias=bias, activation=activation)
        return cls(kernels, kernels.pack(matrix), format.arithmetic)

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x [T, in] to [T, out], of x's dtype if none is given."""
        return self.kernels.linear(x, self.weight, dtype)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def describe(self, name: str, layers: int, wanted_layers: int) -> Product:
        """What the meter needs to count this product, in so many layers (see `Product`)."""
        weight = self.weight
        shape = (weight.in_features, weight.rows, weight.out_features)
        return Product(name, *shape, weight.nbytes, layers, wanted_layers, self.format)
