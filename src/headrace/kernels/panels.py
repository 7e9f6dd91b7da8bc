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
    `description` is what the extension is told of it. Raises ValueError for parts that are not what numbers say."""

    def __init__(self, parts: Mapping[str, Tensor], numbers: tuple[int, ...]) -> None:
        check_panels(parts, numbers)
        self.parts = dict(parts)
        self.numbers = numbers
        self.dtype = parts["panels"].dtype
        self.out_features, padded, input_group, gate, weight_group, self.in_features = numbers
        self.rows = self.out_features * (2 if gate else 1)
        panels, scales, bias, *rest = (address(parts.get(name)) for name in PARTS)
        shape = (self.out_features, padded, input_group, gate)
        self.description = _cpu.Weight((TYPES[self.dtype], panels, *shape, scales, bias, weight_group, *rest))

    @property
    def gated(self) -> bool:
        """Whether half of its outputs are gates."""
        return self.rows != self.out_features

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


def pack_panels(matrix: Matrix, table: _cpu.Table) -> PanelWeight:
    """A matrix laid out as panels, with zeros where outputs or inputs end. Equal by any table. Raises ValueError for
    one that is not as `Matrix` says."""
    check_matrix(matrix)
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


def check_matrix(matrix: Matrix) -> None:
    """Raises ValueError for parts that do not belong together; what they are as panels, check_panels looks at."""
    values, halves = matrix.values, 1 if matrix.activation is None else 2
    if values.dim() != 2 or values.dtype not in TYPES or not values.numel() or values.shape[0] % halves:
        raise ValueError(f"a weight {values.dtype} {list(values.shape)} cannot be packed")
    for name in ("scales", "minimums", "bias"):
        part = getattr(matrix, name)
        if part is not None and (part.dim() == 0 or part.shape[0] != len(values)):
            raise ValueError(f"{name} {list(part.shape)} are not those of {len(values)} outputs")


def check_panels(parts: Mapping[str, Tensor], numbers: tuple[int, ...]) -> None:
    """Raises ValueError unless numbers go together, and there are exactly the parts, bias or not, that they tell of."""
    if "panels" not in parts or parts["panels"].dtype not in TYPES or len(numbers) != 6:
        raise ValueError(f"parts {', '.join(parts)} and {len(numbers)} numbers are no packed weight")
    dtype = parts["panels"].dtype
    out, padded, input_group, gate, weight_group, columns = numbers
    if not (all(type(each) is int for each in numbers) and out > 0 and columns > 0 and gate in GATES.values()):
        raise ValueError(f"a packed weight cannot have the numbers {numbers}")
    odd = dtype == torch.bfloat16 and columns % 2
    groups_fit = not weight_group if dtype != torch.uint8 else weight_group > 0 and not weight_group % 16
    if dtype in (torch.int8, torch.uint8):
        step = weight_group if dtype == torch.uint8 else 4
        groups_fit = groups_fit and input_group > 0 and not input_group % step
    if padded != columns + odd or not groups_fit:
        raise ValueError(f"{dtype} weights cannot have inputs and groups of {numbers}: see Matrix")
    expected = list_parts(dtype, numbers)
    for name, part in parts.items():
        if (part.dtype, tuple(part.shape)) != expected.get(name) or not part.is_contiguous():
            raise ValueError(f"{name} {part.dtype} {list(part.shape)} of a packed weight must be {expected.get(name)}")
    missing = expected.keys() - parts.keys() - {"bias", "input_scales"}
    if missing:
        raise ValueError(f"a packed weight of {dtype} lacks its {', '.join(sorted(missing))}")


def list_parts(dtype: torch.dtype, numbers: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each part that a packed weight may have: see `arrange`."""
    out, padded, _, gate, weight_group, columns = numbers
    halves = 2 if gate else 1
    width = PANEL // halves
    panels, held = -(-out // width), HELD[dtype]
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "panels": (dtype, (panels, -(-padded // held), PANEL, 4 // dtype.itemsize)),
        "bias": (torch.float32, (panels, 1, halves, width)),
    }
    if dtype == torch.int8:
        parts["scales"] = parts["bias"]
    elif dtype == torch.uint8:
        parts["group_scales"] = torch.float16, (panels, -(-columns // weight_group), halves, width)
        parts["group_minimums"] = parts["group_scales"]
    if dtype in (torch.int8, torch.uint8):
        parts["input_scales"] = torch.float32, (columns,)
    return parts


def arrange(numbers: Tensor, out: int, panels: int) -> Tensor:
    """Numbers for each output [out, ...], or [2 out, ...] with gates first, as panels have them: [panels, ..., 32]."""
    parts = numbers.reshape(-1, out, numbers.shape[1:].numel())
    width = PANEL // len(parts)
    padded = functional.pad(parts, (0, 0, 0, panels * width - out))
    return padded.view(len(parts), panels, width, -1).permute(1, 3, 0, 2).contiguous()


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
