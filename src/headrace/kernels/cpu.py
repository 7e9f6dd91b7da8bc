"""The kernels in C++, for float32 and bfloat16 on any processor; the fastest instruction set is chosen when loaded.

This module checks shapes and hands addresses over; csrc/ holds the arithmetic. torch is imported before the extension
so that both use one OpenMP thread pool, whose size torch.set_num_threads sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import headrace.kernels._cpu as _cpu
from headrace.kernels.base import Activation, AttentionSpec, PackedWeight, RaggedBatch
from headrace.kernels.reference import PlainWeight

TYPES = {torch.float32: 0, torch.bfloat16: 1}
PANEL = 32
# oneDNN orders a weight for products of about so many rows.
USUAL_ROWS = 64


@dataclass(frozen=True, slots=True)
class PanelWeight:
    """A float32 weight as panels of 32 output features, [out / 32, in, 32], zeros where out ends."""

    panels: Tensor
    out_features: int

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes


@dataclass(frozen=True, slots=True)
class OneDnnWeight:
    """A bfloat16 weight in oneDNN's own order for this processor, so that no product has to reorder it first."""

    tensor: Tensor
    out_features: int
    nbytes: int

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.tensor, bias, "none", [], "")
        return result


class CpuKernels:
    """See `Kernels`. In float32 every result row has the same bits in any batch, by any number of threads."""

    name = "cpu"

    @property
    def instruction_set(self) -> str:
        """portable, avx2 or avx512."""
        return _cpu.instruction_set()

    def pack(self, weight: Tensor) -> PackedWeight:
        weight = weight.contiguous()
        if weight.dtype == torch.bfloat16:
            if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return PlainWeight(weight.clone())  # oneDNN has no order of its own for this processor
            ordered = torch.ops.mkldnn._reorder_linear_weight(weight, USUAL_ROWS)
            return OneDnnWeight(ordered, weight.shape[0], weight.nbytes)
        rows, columns = weight.shape
        panels = torch.empty(-(-rows // PANEL), columns, PANEL)
        _cpu.pack(weight.data_ptr(), panels.data_ptr(), rows, columns)
        return PanelWeight(panels, rows)

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, OneDnnWeight | PlainWeight):
            return weight.multiply(x, None if bias is None else bias.to(x.dtype))
        assert isinstance(weight, PanelWeight)
        x = x.contiguous()
        columns = weight.panels.shape[1]
        if x.shape[1] != columns or x.dtype != torch.float32:
            raise ValueError(f"a float32 product over {columns} features cannot take {x.dtype} {list(x.shape)}")
        y = torch.empty(len(x), weight.out_features)
        address = 0 if bias is None else bias.data_ptr()
        _cpu.linear(x.data_ptr(), weight.panels.data_ptr(), address, y.data_ptr(), len(x), weight.out_features, columns)
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        rows = describe_rows(x if x.dim() == 3 else x[:, None])
        _cpu.rms_norm(TYPES[x.dtype], rows, weight.data_ptr(), eps, y.data_ptr())
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(residual)
        rows = describe_rows(x[:, None])
        _cpu.add_rms_norm(TYPES[x.dtype], rows, residual.data_ptr(), weight.data_ptr(), eps, y.data_ptr())
        return y

    def gated_activation(self, gate_up: Tensor, activation: Activation) -> Tensor:
        size = gate_up.shape[1] // 2
        y = torch.empty(len(gate_up), size, dtype=gate_up.dtype)
        kind = TYPES[gate_up.dtype]
        _cpu.gated_activation(kind, gate_up.data_ptr(), y.data_ptr(), len(gate_up), size, activation == "gelu_tanh")
        return y

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        _cpu.rotate(TYPES[heads.dtype], describe_rows(heads), cos.data_ptr(), sin.data_ptr())

    def write_kv(self, keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
        cache = describe_cache(key_cache, value_cache)
        _cpu.write_kv(TYPES[keys.dtype], describe_rows(keys), describe_rows(values), cache, slots.data_ptr())

    def attention(
        self, queries: Tensor, key_cache: Tensor, value_cache: Tensor, batch: RaggedBatch, spec: AttentionSpec
    ) -> Tensor:
        y = torch.empty(queries.shape, dtype=queries.dtype)
        table = batch.block_tables[spec.group]
        ragged = (
            len(batch.context_lengths),
            batch.query_starts.data_ptr(),
            batch.positions.data_ptr(),
            table.data_ptr(),
            table.shape[1],
        )
        numbers = (spec.scale, spec.window or 0, spec.soft_cap or 0.0)
        cache = describe_cache(key_cache, value_cache)
        _cpu.attention(TYPES[queries.dtype], describe_rows(queries), cache, ragged, numbers, y.data_ptr())
        return y


def describe_rows(x: Tensor) -> tuple[int, int, int, int, int]:
    """Address, tokens, stride between tokens, heads and head size of x [T, h, D], whose tokens are contiguous."""
    tokens, heads, size = x.shape
    if x.stride(2) != 1 or (heads > 1 and x.stride(1) != size):
        raise ValueError(f"a token's heads must be contiguous; shape {list(x.shape)} has strides {x.stride()}")
    return x.data_ptr(), tokens, x.stride(0), heads, size


def describe_cache(keys: Tensor, values: Tensor) -> tuple[int, int, int, int, int]:
    """Addresses, kv heads, head size and block size of one layer's cache. Raises ValueError for an odd block size."""
    _, kv_heads, head_size, block_size = keys.shape
    if block_size % 16:
        raise ValueError(f"the block size must be a multiple of 16, got {block_size}")
    return keys.data_ptr(), values.data_ptr(), kv_heads, head_size, block_size
