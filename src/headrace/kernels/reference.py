"""The kernels in plain torch: slow, readable, on any device. The oracle of every faster one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from headrace.kernels.base import Activation, AttentionSpec, PackedWeight, RaggedBatch


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """A weight [out, in] as it is."""

    tensor: Tensor

    @property
    def out_features(self) -> int:
        return self.tensor.shape[0]

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, self.tensor, bias)


class ReferenceKernels:
    """See `Kernels`. Does not promise that a row has the same bits in any batch: torch's products may not."""

    name = "reference"

    def pack(self, weight: Tensor) -> PackedWeight:
        return PlainWeight(weight.clone())

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        assert isinstance(weight, PlainWeight)
        return weight.multiply(x, None if bias is None else bias.to(x.dtype))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * weight).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps)

    def gated_activation(self, gate_up: Tensor, activation: Activation) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        gate = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
        return (gate * up).to(gate_up.dtype)

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        first, second = heads.float().chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        heads.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))

    def write_kv(self, keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
        block_size = value_cache.shape[2]
        blocks, offsets = slots // block_size, slots % block_size
        key_cache[blocks, :, :, offsets] = keys.to(key_cache.dtype)
        value_cache[blocks, :, offsets] = values.to(value_cache.dtype)

    def attention(
        self, queries: Tensor, key_cache: Tensor, value_cache: Tensor, batch: RaggedBatch, spec: AttentionSpec
    ) -> Tensor:
        output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        block_size, groups = value_cache.shape[2], queries.shape[1] // key_cache.shape[1]
        starts, contexts = batch.query_starts.tolist(), batch.context_lengths.tolist()
        for index, context in enumerate(contexts):
            rows = slice(starts[index], starts[index + 1])
            positions = batch.positions[rows]
            first = 0 if spec.window is None else max(0, int(positions[0]) - spec.window + 1)
            blocks = batch.block_tables[spec.group][index, first // block_size : -(-context // block_size)].long()
            begin = first // block_size * block_size
            keys = key_cache[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, : context - begin]
            values = value_cache[blocks].permute(1, 0, 2, 3).flatten(1, 2)[:, : context - begin]
            places = torch.arange(begin, context, device=queries.device)
            hidden = places[None] > positions[:, None]
            if spec.window is not None:
                hidden |= places[None] <= positions[:, None] - spec.window
            output[rows] = self._attend(queries[rows].float(), keys.float(), values.float(), hidden, spec, groups)
        return output

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, spec: AttentionSpec, groups: int
    ) -> Tensor:
        """Plain attention of queries [T, heads, D] over keys and values [kv heads, C, D]; hidden is bool [T, C]."""
        keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
        scores = torch.einsum("thd,hcd->htc", queries, keys) * spec.scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("htc,hcd->thd", weights, values)
