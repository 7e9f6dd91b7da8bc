"""The kernels in C++, in float32, bfloat16 and integers of 8 or 4 bits, on any processor.

This module checks shapes (checks.py) and hands addresses over; csrc/ holds the arithmetic and its pool of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

import headrace.kernels._cpu as _cpu
from headrace.core import InputError
from headrace.kernels.base import AttentionSpec, HeadSpec, LayerCache, RaggedBatch
from headrace.kernels.checks import (
    FLOATS,
    check_alike,
    check_heads,
    check_moving,
    check_norm,
    check_plane,
    check_product,
    check_queries,
    check_sealing,
    check_shadow,
    check_table,
    check_tensor,
    check_unpacking,
    check_unpacking_by,
)
from headrace.kernels.matrix import Matrix, PackedWeight
from headrace.kernels.panels import TYPES, PanelWeight, address, pack_panels
from headrace.kernels.shadows import ShadowRows
from headrace.kernels.vectors import VectorForm

# Of the next weight so much is fetched while nothing else is done: what a core's own cache holds.
EXPECTED_BYTES = 2**20
NOTHING_SEALED = (0, 0, 4, 4, 0, 0, 0, 0, 0, 0)


class CpuKernels:
    """See `Kernels`. Every result row has the same bits in any batch, by any number of threads."""

    name = "cpu"

    def __init__(self, instruction_set: str = "auto") -> None:
        """Use this instruction set, auto for the fastest one. Raises ValueError for one that the processor lacks."""
        # Other kernels of this process may have another one.
        self.table = _cpu.find_table(_cpu.instruction_sets()[0] if instruction_set == "auto" else instruction_set)
        self.instruction_set = self.table.instruction_set
        # Activations come and go a thousand times a second: giving their pages back would mean clearing them each time.
        _cpu.keep_freed_memory()

    def set_threads(self, threads: int) -> None:
        # torch does little beside these kernels, and its own threads would spin on the cores that the pool works on.
        torch.set_num_threads(1)
        try:
            _cpu.set_threads(threads)
        except RuntimeError as error:
            raise InputError(f"threads {threads}: {error}; set fewer") from error

    def pack(self, matrix: Matrix) -> PackedWeight:
        return pack_panels(matrix, self.table)

    def expect(self, weights: Sequence[PackedWeight]) -> None:
        for weight, following in zip(weights, [*weights[1:], weights[0]], strict=True):
            assert isinstance(weight, PanelWeight) and isinstance(following, PanelWeight)
            panels = following.parts["panels"]
            weight.description.expect_next(panels.data_ptr(), min(panels.nbytes, EXPECTED_BYTES))

    def unload(self, weight: PackedWeight) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        assert isinstance(weight, PanelWeight)
        return weight.parts, weight.numbers

    def reload(self, parts: Mapping[str, Tensor], numbers: tuple[int, ...]) -> PackedWeight:
        return PanelWeight(parts, numbers)

    def linear(self, x: Tensor, weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        assert isinstance(weight, PanelWeight)
        check_product(x, weight, dtype)
        if weight.dtype == torch.bfloat16 and weight.in_features % 2:
            x = functional.pad(x, (0, 1))
        x = x.contiguous()
        y = torch.empty(x.shape[0], weight.out_features, dtype=dtype or x.dtype)
        self.table.linear(TYPES[x.dtype], x.data_ptr(), x.shape[0], weight.description, TYPES[y.dtype], y.data_ptr())
        return y

    def find_largest(self, x: Tensor, weight: PackedWeight) -> Tensor:
        assert isinstance(weight, PanelWeight)
        check_product(x, weight)
        if weight.gated:
            raise ValueError("the largest of a product with an activation is not to be had")
        if weight.dtype == torch.bfloat16 and weight.in_features % 2:
            x = functional.pad(x, (0, 1))
        x, y = x.contiguous(), torch.empty(x.shape[0], dtype=torch.int64)
        self.table.find_largest(TYPES[x.dtype], x.data_ptr(), x.shape[0], weight.description, y.data_ptr())
        return y

    def norm_linear(self, x: Tensor | None, residual: Tensor, norm: Tensor, eps: float, weight: PackedWeight) -> Tensor:
        assert isinstance(weight, PanelWeight)
        check_product(residual, weight)
        check_norm(residual, norm)
        check_alike(x, residual)
        if weight.dtype == torch.bfloat16 and weight.in_features % 2:
            normed = self.rms_norm(residual, norm, eps) if x is None else self.add_rms_norm(x, residual, norm, eps)
            return self.linear(normed, weight)
        rows, kind = residual.shape[0], TYPES[residual.dtype]
        y = torch.empty(rows, weight.out_features, dtype=residual.dtype)
        added, addresses = address(x), (residual.data_ptr(), norm.data_ptr())
        self.table.norm_linear(kind, added, rows, *addresses, eps, weight.description, y.data_ptr())
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        check_norm(x, weight)
        x = x.contiguous()
        y = torch.empty_like(x)
        rows, size = x.shape
        self.table.rms_norm(TYPES[x.dtype], x.data_ptr(), weight.data_ptr(), eps, rows, size, y.data_ptr())
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        check_norm(x, weight)
        check_alike(x, residual)
        y = torch.empty_like(x)
        (rows, size), kind = x.shape, TYPES[x.dtype]
        self.table.add_rms_norm(
            kind, x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps, rows, size, y.data_ptr()
        )
        return y

    def place_heads(
        self,
        fused: Tensor,
        spec: HeadSpec,
        rotation: tuple[Tensor, Tensor],
        cache: LayerCache,
        slots: Tensor,
    ) -> None:
        described = describe_cache(cache)
        check_heads(fused, spec, rotation, cache, slots)
        tokens, every, _ = fused.shape
        heads = (
            fused.data_ptr(),
            tokens,
            every - 2 * described[4],
            address(spec.query_norm),
            address(spec.key_norm),
            spec.eps,
            *(each.data_ptr() for each in rotation),
        )
        self.table.place_heads(TYPES[fused.dtype], heads, described, slots.data_ptr())  # type: ignore[arg-type]

    def seal(self, cache: LayerCache, exact: Tensor, sealed: Tensor) -> None:
        described = describe_cache(cache), describe_sealed(cache)
        check_tensor("exact blocks", exact, torch.int32, (len(exact),))
        check_tensor("sealed blocks", sealed, torch.int32, (len(exact),))
        self.table.seal(TYPES[cache.keys.dtype], *described, exact.data_ptr(), sealed.data_ptr(), exact.shape[0])

    def move_tokens(self, cache: LayerCache, blocks: Tensor, slots: Tensor, into: int) -> None:
        check_moving(cache, blocks, slots, into)
        blocks, slots, described = blocks.int().contiguous(), slots.contiguous(), describe_cache(cache)
        moved = blocks.data_ptr(), slots.data_ptr(), slots.shape[1], into
        self.table.move_tokens(TYPES[cache.keys.dtype], described, *moved)

    def unpack(
        self,
        form: VectorForm,
        plane: Tensor,
        blocks: Tensor,
        into: Tensor,
        factors: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        check_unpacking(form, plane, blocks, into)
        check_unpacking_by(form, blocks, factors, order)
        blocks, head = blocks.contiguous(), into.shape[3] if not form.by_channel else form.width
        numbers = form.tokens, form.width, form.bits, form.group, form.exponents, form.by_channel
        wanted = blocks.data_ptr(), len(blocks), address(factors), address(order)
        packed = plane.data_ptr(), plane.stride(0), *numbers
        self.table.unpack(TYPES[into.dtype], packed, wanted, head, into.data_ptr())

    def observe(
        self, queries: Tensor, cache: LayerCache, batch: RaggedBatch, spec: AttentionSpec, share: float = 0.0
    ) -> None:
        assert cache.mass is not None and batch.observed is not None
        described, ragged = describe_cache(cache), describe_batch(batch, cache.group, cache.keys.shape[1])
        check_queries(queries, cache, len(batch.positions))
        check_tensor("observed", batch.observed, torch.int32, (ragged[0],))
        numbers, rows = (spec.scale, 0, spec.soft_cap or 0.0), describe_rows(queries)
        counted = cache.mass.data_ptr(), batch.observed.data_ptr(), share
        self.table.observe(TYPES[queries.dtype], rows, described, ragged, numbers, *counted)

    def recall(
        self,
        queries: Tensor,
        cache: LayerCache,
        shadow: ShadowRows,
        into: Tensor,
        rope: tuple[Tensor, Tensor],
        scale: float,
    ) -> None:
        check_queries(queries, cache, 1)
        check_shadow(shadow, cache, into, rope)
        numbers = shadow.rows.blocks.data_ptr(), shadow.chunks, shadow.count, shadow.rank, address(shadow.values)
        wanted = into.data_ptr(), rope[0].data_ptr(), rope[1].data_ptr(), scale
        self.table.recall(TYPES[queries.dtype], describe_rows(queries), describe_cache(cache), (*numbers, *wanted))

    def attention(self, queries: Tensor, cache: LayerCache, batch: RaggedBatch, spec: AttentionSpec) -> Tensor:
        y = torch.empty(queries.shape, dtype=queries.dtype)
        described = describe_cache(cache)
        check_queries(queries, cache, len(batch.positions))
        ragged = describe_batch(batch, cache.group, described[4])
        sealed: tuple[int, ...] = NOTHING_SEALED
        if cache.sealed is not None and not batch.read_exactly:
            check_table(table := batch.block_tables[cache.sealed_group], ragged[0], described[4])
            sealed = describe_sealed(cache, table)
        numbers = (spec.scale, spec.window or 0, spec.soft_cap or 0.0)
        kind, rows = TYPES[queries.dtype], describe_rows(queries)
        self.table.attention(kind, rows, described, sealed, ragged, numbers, y.data_ptr())
        return y

    def multiply_registers(self, dtype: torch.dtype, rounds: int) -> int:
        """Multiply and add in registers only, so many rounds on every thread; how many multiply-adds that was."""
        return self.table.multiply_registers(TYPES[dtype], rounds)

    def sweep(self, kind: int, data: Tensor) -> int:
        """Go through memory once, reading (0), writing (1) or copying one half to the other (2); bytes that moved."""
        self.table.sweep(kind, data.data_ptr(), data.nbytes)
        return data.nbytes


def describe_rows(x: Tensor) -> tuple[int, int, int, int, int]:
    """Address, tokens, stride between tokens, heads and head size of x [T, h, D], whose tokens are contiguous."""
    tokens, heads, size = x.shape
    if x.stride(2) != 1 or (heads > 1 and x.stride(1) != size):
        raise ValueError(f"a token's heads must be contiguous; shape {list(x.shape)} has strides {x.stride()}")
    return x.data_ptr(), tokens, x.stride(0), heads, size


def describe_batch(batch: RaggedBatch, group: int, kv_heads: int) -> tuple[int, int, int, int, int, int, int]:
    """Sequences, addresses of their starts and positions, the group's table, its strides, and where sequences begin."""
    table, sequences = batch.block_tables[group], batch.context_lengths.shape[0]
    check_table(table, sequences, kv_heads)
    check_tensor("query_starts", batch.query_starts, torch.int32, (sequences + 1,))
    check_tensor("positions", batch.positions, torch.int32, (len(batch.positions),))
    if batch.begins is not None:
        check_tensor("begins", batch.begins, torch.int32, (sequences,))
    strides = table.stride(0), table.stride(1) if table.dim() == 3 else 0
    starts, positions = batch.query_starts.data_ptr(), batch.positions.data_ptr()
    return sequences, starts, positions, table.data_ptr(), *strides, address(batch.begins)


def describe_cache(cache: LayerCache) -> tuple[int, int, int, int, int, int, int]:
    """Addresses (the bias too), bytes between blocks, kv heads, head size and block size of one layer's exact blocks.

    Raises ValueError for an odd block size and for blocks that are not as `LayerCache` says.
    """
    keys, values = cache.keys, cache.values
    blocks, kv_heads, lanes, block_size, pair = keys.shape
    if block_size % 16:
        raise ValueError(f"the block size must be a multiple of 16, got {block_size}")
    if keys.dtype not in FLOATS or pair * keys.itemsize != 4:
        raise ValueError(f"a cache of {keys.dtype} must hold {4 // keys.itemsize} in a lane, got {pair}")
    head = lanes * pair
    if values.dtype != keys.dtype or values.shape != (blocks, kv_heads, block_size // pair, head, pair):
        raise ValueError(f"values {values.dtype} {list(values.shape)} are not those of keys {list(keys.shape)}")
    # What torch says of the way from an only block to the next means nothing.
    stride, (apart, *within) = keys.stride(0), values.stride()
    if (blocks > 1 and stride != apart) or within != [block_size * head, head * pair, pair, 1]:
        raise ValueError(f"a block's values must be contiguous, and as far apart as keys; strides {values.stride()}")
    if keys.stride()[1:] != (head * block_size, block_size * pair, pair, 1):
        raise ValueError(f"a block's keys must be contiguous, and blocks equally far apart; strides {keys.stride()}")
    for plane in (cache.bias, cache.mass):
        if plane is not None:
            check_plane(plane, (blocks, kv_heads, block_size), stride * keys.itemsize)
    addresses = keys.data_ptr(), values.data_ptr(), address(cache.bias)
    return *addresses, stride * keys.itemsize, kv_heads, head, block_size


def describe_sealed(cache: LayerCache, table: Tensor | None = None) -> tuple[int, ...]:
    """Address, bytes between blocks, bits of keys and values, residual, first tokens, table, its strides, and bias, of
    sealed blocks.

    Raises ValueError where there are none, or where their bytes are not what their form says.
    """
    if cache.sealed is None or cache.form is None:
        raise ValueError("this layer's cache has no sealed blocks")
    check_sealing(cache.form, cache)
    bits = cache.form.key_bits, cache.form.value_bits
    strides = (0, 0) if table is None else (table.stride(0), table.stride(1) if table.dim() == 3 else 0)
    numbers = *bits, cache.residual, cache.first
    planes = address(table), *strides, address(cache.sealed_bias)
    return cache.sealed.data_ptr(), cache.sealed.stride(0), *numbers, *planes
