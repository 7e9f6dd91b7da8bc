"""A weight matrix before and after kernels have laid it out for themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix as a quantisation stores it, before a kernel lays it out for itself.

    values        [out, in] float32, bfloat16, int8 from -127 to 127, or uint8 from 0 to 15 for 4-bit weights
    scales        int8: float32 [out], a weight is its value times its row's scale
                  uint8: float16 [out, groups of weight_group inputs], the last one may be shorter
    minimums      uint8: float16 like scales, a weight is value * scale + minimum
    weight_group  uint8: a multiple of 16 that divides input_group
    input_group   integers only: so many neighbouring inputs of a token share one scale, the largest magnitude over 127,
                  when they are rounded to 8 bits; a multiple of 4
    input_scales  integers only: float32 [in] that inputs are multiplied by before they are rounded, or None
    bias          float32 [out] or None
    activation    None, or the first half of the outputs are gates and a product gives activation(gate) * second half
    """

    values: Tensor
    scales: Tensor | None = None
    minimums: Tensor | None = None
    weight_group: int = 0
    input_group: int = 0
    input_scales: Tensor | None = None
    bias: Tensor | None = None
    activation: Activation | None = None

    @property
    def out_features(self) -> int:
        """Features that a product gives."""
        return self.values.shape[0] // (1 if self.activation is None else 2)

    def to(self, device: str) -> Matrix:
        """The same on another device."""
        moved: dict[str, Any] = {name: part.to(device) for name, part in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are there, by name."""
        names = ("values", "scales", "minimums", "input_scales", "bias")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tensors().values())


class PackedWeight(Protocol):
    """A weight matrix in a kernel's own layout. rows are out_features, or twice that where half of them are gates."""

    @property
    def rows(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def nbytes(self) -> int: ...
