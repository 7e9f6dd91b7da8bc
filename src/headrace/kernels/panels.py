"""Weights as the kernels in C++ have them: panels of 32 outputs, in float32, bfloat16 or integers of 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

import headrace.kernels._cpu as _cpu
from headrace.kernels.matrix import Matrix

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
GATES = {None: 0, "silu": 1, "gelu_tanh": 2}
PANEL = 32
PARTS = ("panels", "scales", "bias", "group_scales", "group_minimums", "input_scales")
# Elements of a weight in a lane of 32 bits, by dtype.
HELD = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4, torch.uint8: 8}


class PanelWeight:
    """A weight as panels of 32 outputs. parts are those of PARTS that there are, panels at least (csrc/table.h).
    numbers: outputs, padded inputs, inputs that share a scale, gate, inputs of a group of 4-bit weights, inputs.
    `description` is what the extension is told of it."""

    def __init__(self, parts: Mapping[str, Tensor], numbers: tuple[int, ...]) -> None:
        self.parts = dict(parts)
        self.numbers = numbers
        self.dtype = parts["panels"].dtype
        self.out_features, padded, input_group, gate, weight_group, self.in_features = numbers
        self.rows = self.out_features * (2 if gate else 1)
        panels, scales, bias, *rest = (address(parts.get(name)) for name in PARTS)
        shape = (self.out_features, padded, input_group, gate)
        self.description = _cpu.Weight((TYPES[self.dtype], panels, *shape, scales, bias, weight_group, *rest))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


def pack_panels(matrix: Matrix, table: _cpu.Table) -> PanelWeight:
    """A matrix laid out as panels, with zeros where outputs or inputs end. Equal by any table."""
    values = matrix.values.contiguous()
    if values.dtype == torch.bfloat16 and values.shape[1] % 2:
        values = functional.pad(values, (0, 1))
    out, columns = matrix.out_features, values.shape[1]
    count = -(-out // (PANEL if matrix.activation is None else PANEL // 2))
    held = HELD[values.dtype]
    panels = torch.empty(count, -(-columns // held), PANEL, 4 // values.itemsize, dtype=values.dtype)
    by_output = {"bias": matrix.bias, "scales": None if matrix.weight_group else matrix.scales}
    by_group = {"group_scales": matrix.scales, "group_minimums": matrix.minimums} if matrix.weight_group else {}
    parts = {name: arrange(each.float(), out, count) for name, each in by_output.items() if each is not None}
    parts |= {name: arrange(each, out, count) for name, each in by_group.items() if each is not None}
    if matrix.input_scales is not None:
        parts["input_scales"] = matrix.input_scales.float().contiguous()
    gate = GATES[matrix.activation]
    numbers = (out, columns, matrix.input_group, gate, matrix.weight_group, matrix.values.shape[1])
    weight = PanelWeight(parts | {"panels": panels}, numbers)
    table.pack(values.data_ptr(), weight.description, panels.data_ptr())
    return weight


def arrange(numbers: Tensor, out: int, panels: int) -> Tensor:
    """Numbers for each output [out, ...], or [2 out, ...] with gates first, as panels have them: [panels, ..., 32]."""
    parts = numbers.reshape(-1, out, numbers.shape[1:].numel())
    width = PANEL // len(parts)
    padded = functional.pad(parts, (0, 0, 0, panels * width - out))
    return padded.view(len(parts), panels, width, -1).permute(1, 3, 0, 2).contiguous()


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
