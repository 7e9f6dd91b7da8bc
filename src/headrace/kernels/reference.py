"""The kernels in plain torch: slow, readable, on any device. The oracle of every faster one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from headrace.kernels.base import AttentionSpec, HeadSpec, LayerCache, RaggedBatch, find_largest_of
from headrace.kernels.contexts import read_blocks, see_context, take_head, write_slots
from headrace.kernels.integers import dequantize, round_activations
from headrace.kernels.matrix import Activation, Matrix, PackedWeight
from headrace.kernels.shadows import CHUNK, ShadowRows, choose_chunks
from headrace.kernels.units import pack_units
from headrace.kernels.vectors import VectorForm, lay_vectors

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
        return find_largest_of(self.linear(x, weight, torch.float32))

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
        cache: LayerCache,
        slots: Tensor,
    ) -> None:
        key_cache, value_cache = cache.keys, cache.values
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

    def seal(self, cache: LayerCache, exact: Tensor, sealed: Tensor) -> None:
        assert cache.sealed is not None and cache.form is not None
        units = pack_units(*read_blocks(cache, exact.long()), cache.form)  # [kv heads, units, bytes]
        cache.sealed[sealed.long()] = units.reshape(len(units), len(sealed), -1).transpose(0, 1)

    def move_tokens(self, cache: LayerCache, blocks: Tensor, slots: Tensor, into: int) -> None:
        chosen = slots[..., None].expand(-1, -1, cache.values.shape[3])
        keys, values = (each.gather(1, chosen) for each in read_blocks(cache, blocks.long()))
        write_slots(cache, blocks.long(), into, keys, values)

    def unpack(
        self,
        form: VectorForm,
        plane: Tensor,
        blocks: Tensor,
        into: Tensor,
        factors: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        vectors = form.decode(form.take(plane[blocks]))
        if order is not None:
            vectors = vectors[..., order]
        if factors is not None:
            vectors = vectors * factors[..., None]
        into.copy_(lay_vectors(vectors, into, form.by_channel))

    def observe(
        self, queries: Tensor, cache: LayerCache, batch: RaggedBatch, spec: AttentionSpec, share: float = 0.0
    ) -> None:
        assert cache.mass is not None and batch.observed is not None
        starts, contexts = batch.query_starts.tolist(), batch.context_lengths.tolist()
        begins = [0] * len(contexts) if batch.begins is None else batch.begins.tolist()
        size, table = cache.keys.shape[3], batch.block_tables[cache.group]
        for index, first in enumerate(batch.observed.tolist()):
            begin, end, rows = begins[index], contexts[index], slice(starts[index], starts[index + 1])
            start = end - (rows.stop - rows.start)
            if not 0 <= first < end:
                continue
            blocks = table[index, begin // size : -(-end // size)].long()
            keys, _, added = see_context(cache, batch, spec, index, begin, end)
            mass = cache.mass[blocks].transpose(0, 1).flatten(1)
            mass[:, 0 if first >= start else start - begin :] = 0
            weights = weigh(queries[rows].float(), keys, added, spec)[:, :, max(first - start, 0) :]
            if share:
                seen = torch.arange(max(first, start) + 1, end + 1, device=keys.device) - begin
                weights = (weights * seen[:, None] >= 1) + weights * share
            mass[:, : end - begin] += weights.sum((1, 2))
            cache.mass[blocks] = mass.view(len(mass), -1, size).transpose(0, 1)

    def recall(
        self,
        queries: Tensor,
        cache: LayerCache,
        shadow: ShadowRows,
        into: Tensor,
        rope: tuple[Tensor, Tensor],
        scale: float,
    ) -> None:
        chosen = choose_chunks(queries[0], shadow.read_landmarks(), shadow.count, scale)
        keys = shadow.restore_keys(chosen)
        tokens = chosen[..., None] * CHUNK + torch.arange(CHUNK, device=chosen.device)
        for own, places in zip(keys, tokens.flatten(1), strict=True):
            rotate(own[:, None], rope[0][places], rope[1][places])
        write_slots(cache, into.long(), 0, keys, shadow.read_values(chosen))
        shadow.write_places(chosen)

    def attention(self, queries: Tensor, cache: LayerCache, batch: RaggedBatch, spec: AttentionSpec) -> Tensor:
        output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        table = batch.block_tables[cache.group]
        if table.dim() == 3:
            for head, group in enumerate(output.chunk(table.shape[1], 1)):
                part, tables = take_head(cache, head), [table[:, head]]
                if part.sealed is not None:
                    tables.append(batch.block_tables[cache.sealed_group][:, head])
                chosen = replace(batch, block_tables=tuple(tables))
                rows = slice(head * group.shape[1], (head + 1) * group.shape[1])
                group.copy_(self.attention(queries[:, rows], part, chosen, spec))
            return output
        starts, contexts = batch.query_starts.tolist(), batch.context_lengths.tolist()
        begins = [0] * len(contexts) if batch.begins is None else batch.begins.tolist()
        for index, (begin, context) in enumerate(zip(begins, contexts, strict=True)):
            rows = slice(starts[index], starts[index + 1])
            keys, values, added = see_context(cache, batch, spec, index, begin, context)
            weights = weigh(queries[rows].float(), keys, added, spec)
            output[rows] = torch.einsum("hgtc,hcd->thgd", weights, values).flatten(1, 2)
        return output


def weigh(queries: Tensor, keys: Tensor, added: Tensor, spec: AttentionSpec) -> Tensor:
    """Softmax weights [kv heads, heads a kv head, T, C] of queries [T, heads, D] over keys [kv heads, C, D]; added
    [kv heads or 1, T, C] joins the scores."""
    queries = queries.view(len(queries), len(keys), -1, keys.shape[2])
    scores = torch.einsum("thgd,hcd->hgtc", queries, keys) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    return (scores + added[:, None]).softmax(-1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding of heads [T, h, D] in place."""
    first, second = heads.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    heads.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))
