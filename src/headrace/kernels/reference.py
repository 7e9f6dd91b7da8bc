"""The kernels in plain torch: slow, readable, on any device. The oracle of every faster one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from headrace.kernels.base import Activation, AttentionSpec, HeadSpec, Matrix, PackedWeight, RaggedBatch

ACTIVATIONS: tuple[Activation | None, ...] = (None, "silu", "gelu_tanh")


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """A weight as it is."""

    matrix: Matrix

    @property
    def rows(self) -> int:
        return self.matrix.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.matrix.values.shape[1]

    @property
    def out_features(self) -> int:
        return self.matrix.out_features

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes


class ReferenceKernels:
    """See `Kernels`. Does not promise that a row has the same bits in any batch: torch's products may not."""

    name = "reference"
    instruction_set = "torch"

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def pack(self, matrix: Matrix) -> PackedWeight:
        return PlainWeight(matrix)

    def expect(self, weights: Sequence[PackedWeight]) -> None:
        pass

    def unload(self, weight: PackedWeight) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        assert isinstance(weight, PlainWeight)
        matrix = weight.matrix
        return matrix.tensors(), (matrix.weight_group, matrix.input_group, ACTIVATIONS.index(matrix.activation))

    def reload(self, parts: Mapping[str, Tensor], numbers: tuple[int, ...]) -> PackedWeight:
        weight_group, input_group, activation = numbers
        matrix = Matrix(parts["values"], parts.get("scales"), parts.get("minimums"), weight_group, input_group)
        rest = {"input_scales": parts.get("input_scales"), "bias": parts.get("bias")}
        return PlainWeight(replace(matrix, activation=ACTIVATIONS[activation], **rest))  # type: ignore[arg-type]

    def linear(self, x: Tensor, weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        assert isinstance(weight, PlainWeight)
        matrix = weight.matrix
        if matrix.scales is None:
            y = functional.linear(x, matrix.values).float()
        else:
            scaled = x if matrix.input_scales is None else x.float() * matrix.input_scales
            y = (round_activations(scaled, matrix.input_group) @ dequantize(matrix).T).float()
        if matrix.bias is not None:
            y = y + matrix.bias
        if matrix.activation is not None:
            gate, up = y.chunk(2, dim=-1)
            gate = functional.silu(gate) if matrix.activation == "silu" else functional.gelu(gate, approximate="tanh")
            y = gate * up
        return y.to(dtype or x.dtype)

    def find_largest(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return self.linear(x, weight, torch.float32).argmax(-1)

    def norm_linear(self, x: Tensor | None, residual: Tensor, norm: Tensor, eps: float, weight: PackedWeight) -> Tensor:
        assert isinstance(weight, PlainWeight)
        if x is not None:
            residual += x
        normed = self.rms_norm(residual.float() if weight.matrix.input_group else residual, norm, eps)
        return self.linear(normed, weight, residual.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * weight).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps)

    def place_heads(
        self,
        fused: Tensor,
        spec: HeadSpec,
        rotation: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        slots: Tensor,
    ) -> None:
        key_cache, value_cache = cache
        kv_heads = key_cache.shape[1]
        parts = [fused.shape[1] - 2 * kv_heads, kv_heads, kv_heads]
        queries, keys, values = torch.split(fused, parts, dim=1)
        for heads, norm in ((queries, spec.query_norm), (keys, spec.key_norm)):
            if norm is not None:
                heads.copy_(self.rms_norm(heads, norm, spec.eps))
            rotate(heads, *rotation)
        _, _, lanes, block_size, pair = key_cache.shape
        blocks, offsets = slots // block_size, slots % block_size
        key_cache[blocks, :, :, offsets] = keys.reshape(-1, kv_heads, lanes, pair)
        value_cache[blocks, :, offsets // pair, :, offsets % pair] = values

    def attention(
        self, queries: Tensor, key_cache: Tensor, value_cache: Tensor, batch: RaggedBatch, spec: AttentionSpec
    ) -> Tensor:
        output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        block_size, groups = key_cache.shape[3], queries.shape[1] // key_cache.shape[1]
        starts, contexts = batch.query_starts.tolist(), batch.context_lengths.tolist()
        for index, context in enumerate(contexts):
            rows = slice(starts[index], starts[index + 1])
            positions = batch.positions[rows]
            first = 0 if spec.window is None else max(0, int(positions[0]) - spec.window + 1)
            blocks = batch.block_tables[spec.group][index, first // block_size : -(-context // block_size)].long()
            begin = first // block_size * block_size
            # [blocks, kv heads, lanes, block size, pair] to [kv heads, tokens, D], and the values likewise
            keys = key_cache[blocks].permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)[:, : context - begin]
            values = value_cache[blocks].permute(1, 0, 2, 4, 3).flatten(1, 3)[:, : context - begin]
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


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding of heads [T, h, D] in place."""
    first, second = heads.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    heads.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))


def round_activations(x: Tensor, group: int) -> Tensor:
    """x [T, in] as it is after rounding to 8 bits in groups of inputs, float64.

    Scales and factors are float32's, as in faster kernels: others would take ties to another side.
    """
    rounded = []
    for part in torch.split(x.float(), group, dim=1):
        top = part.abs().amax(-1, keepdim=True)
        # 127 / top would be 127 times its reciprocal in torch, rounded twice.
        factor = torch.where(top > 0, torch.full_like(top, 127) / top, 0)
        rounded.append((part.double() * factor).round() * (top / 127))
    return torch.cat(rounded, dim=1)


def dequantize(matrix: Matrix) -> Tensor:
    """An integer matrix's weights [out, in], float64, as they meet inputs that have been scaled."""
    assert matrix.scales is not None
    values, scales = matrix.values.double(), matrix.scales.double()
    if matrix.minimums is None:
        return values * scales[:, None]
    group, columns = matrix.weight_group, values.shape[1]
    wide, least = (each.repeat_interleave(group, dim=1)[:, :columns] for each in (scales, matrix.minimums.double()))
    return values * wide + least
