"""8-bit weights and activations (W8A8): weights symmetric with a scale for each output, activations rounded on the way.

Activations have a scale for each token and group of inputs, so that one outlier spoils the resolution of its own group
only: nothing is calibrated, and no text of the user's or ours decides what a weight is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.matrix import Matrix

LIMIT = 127
INPUT_GROUP = 144


class Int8:
    """See the module. The last group of a width is shorter where `input_group`, a multiple of 4, does not divide it."""

    dtype = torch.bfloat16
    arithmetic = "int8"

    def __init__(self, input_group: int = INPUT_GROUP) -> None:
        self.input_group = input_group

    @property
    def head(self) -> Int8:
        return self

    def adopt(self, values: Tensor, scales: Tensor, minimums: Tensor) -> None:
        return None

    def store(self, weight: Tensor) -> Matrix:
        wide = weight.float()
        scales = wide.abs().amax(1) / LIMIT
        values = (wide / scales.where(scales > 0, 1)[:, None]).round().to(torch.int8)
        return Matrix(values, scales, input_group=self.input_group)
