"""How weight matrices are stored: the interface of every number format."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, Self

import torch
from torch import Tensor

from headrace.kernels.base import Kernels
from headrace.kernels.matrix import Activation, Matrix, PackedWeight
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

    def adopt(self, values: Tensor, scales: Tensor, minimums: Tensor) -> Matrix | None:
        """4-bit blocks of a checkpoint (`checkpoint.base.Blocks`) as they are, or None where this format is another."""
        ...

    @property
    def head(self) -> Quantization:
        """The format of the product that gives logits, whose errors nothing after it evens out."""
        ...


def join(matrices: list[Matrix]) -> Matrix:
    """Matrices of one format over the same inputs as one, their outputs on top of each other."""
    first = matrices[0]
    scales = [each.scales for each in matrices if each.scales is not None]
    minimums = [each.minimums for each in matrices if each.minimums is not None]
    return replace(
        first,
        values=torch.cat([each.values for each in matrices]),
        scales=torch.cat(scales) if scales else None,
        minimums=torch.cat(minimums) if minimums else None,
    )


class Linear:
    """y = x W^T + b, with a weight that the kernels have laid out for themselves. name is that of its first weight in
    the checkpoint, format that of the arithmetic."""

    def __init__(self, kernels: Kernels, name: str, weight: PackedWeight, format: str) -> None:
        self.kernels = kernels
        self.name = name
        self.weight = weight
        self.format = format

    @classmethod
    def store(
        cls,
        kernels: Kernels,
        name: str,
        matrices: list[Matrix],
        format: str,
        bias: Tensor | None = None,
        activation: Activation | None = None,
    ) -> Self:
        """From matrices of one format, their outputs on top of each other, and a bias for all of them."""
        matrix = join(matrices)
        bias = None if bias is None else bias.float()
        return cls(kernels, name, kernels.pack(replace(matrix, bias=bias, activation=activation)), format)

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x [T, in] to [T, out], of x's dtype if none is given."""
        return self.kernels.linear(x, self.weight, dtype)

    def find_largest(self, x: Tensor) -> Tensor:
        """Where each row of the product [T, out] in float32 is largest: int64 [T]."""
        return self.kernels.find_largest(x, self.weight)

    def of_norm(self, x: Tensor | None, residual: Tensor, norm: Tensor, eps: float) -> Tensor:
        """residual += x in place unless that is None, then this product of its norm (`Kernels.norm_linear`)."""
        return self.kernels.norm_linear(x, residual, norm, eps, self.weight)

    def describe(self, name: str, layers: int, wanted_layers: int) -> Product:
        """What the meter needs to count this product, in so many layers (see `Product`)."""
        weight = self.weight
        shape = (weight.in_features, weight.rows, weight.out_features)
        return Product(name, *shape, weight.nbytes, layers, wanted_layers, self.format)
