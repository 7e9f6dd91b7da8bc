"""The kernels in C++, in float32, bfloat16 and integers of 8 or 4 bits, on any processor.

This module checks shapes and hands addresses over; csrc/ holds the arithmetic and its pool of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

import headrace.kernels._cpu as _cpu
from headrace.core import InputError
from headrace.kernels.base import AttentionSpec, HeadSpec, LayerCache, RaggedBatch
from headrace.kernels.matrix import Matrix, PackedWeight
from headrace.kernels.panels import TYPES, PanelWeight, address, pack_panels
from headrace.kernels.shadows import ShadowRows
from headrace.kernels.vectors import VectorForm

# Of the next weight so much is fetched while nothing else is done: what a core's own cache holds.
EXPECTED_BYTES = 2**20
NOTHING_SEALED = (0, 0, 4, 4, 0, 0, 0, 0)


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
        check_product(x, weight)
        if weight.dtype == torch.bfloat16 and weight.in_features % 2:
            x = functional.pad(x, (0, 1))
        x = x.contiguous()
        y = torch.empty(x.shape[0], weight.out_features, dtype=dtype or x.dtype)
        self.table.linear(TYPES[x.dtype], x.data_ptr(), x.shape[0], weight.description, TYPES[y.dtype], y.data_ptr())
        return y

    def find_largest(self, x: Tensor, weight: PackedWeight) -> Tensor:
        assert isinstance(weight, PanelWeight)
        check_product(x, weight)
        if weight.dtype == torch.bfloat16 and weight.in_features % 2:
            x = functional.pad(x, (0, 1))
        x, y = x.contiguous(), torch.empty(x.shape[0], dtype=torch.int64)
        self.table.find_largest(TYPES[x.dtype], x.data_ptr(), x.shape[0], weight.description, y.data_ptr())
        return y

    def norm_linear(self, x: Tensor | None, residual: Tensor, norm: Tensor, eps: float, weight: PackedWeight) -> Tensor:
        assert isinstance(weight, PanelWeight)
        check_product(residual, weight)
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
        x = x.contiguous()
        y = torch.empty_like(x)
        rows, size = x.shape
        self.table.rms_norm(TYPES[x.dtype], x.data_ptr(), weight.data_ptr(), eps, rows, size, y.data_ptr())
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
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
        tokens, every, _ = fused.shape
        if not fused.is_contiguous():
            raise ValueError(f"queries, keys and values {list(fused.shape)} must be contiguous")
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
        self.table.seal(TYPES[cache.keys.dtype], *described, exact.data_ptr(), sealed.data_ptr(), exact.shape[0])

    def move_tokens(self, cache: LayerCache, blocks: Tensor, slots: Tensor, into: int) -> None:
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
        described, ragged = describe_cache(cache), describe_batch(batch, cache.group)
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
        numbers = shadow.rows.blocks.data_ptr(), shadow.chunks, shadow.count, shadow.rank, address(shadow.values)
        wanted = into.data_ptr(), rope[0].data_ptr(), rope[1].data_ptr(), scale
        self.table.recall(TYPES[queries.dtype], describe_rows(queries), describe_cache(cache), (*numbers, *wanted))

    def attention(self, queries: Tensor, cache: LayerCache, batch: RaggedBatch, spec: AttentionSpec) -> Tensor:
        y = torch.empty(queries.shape, dtype=queries.dtype)
        ragged = describe_batch(batch, cache.group)
        sealed = NOTHING_SEALED
        if cache.sealed is not None and not batch.read_exactly:
            sealed = describe_sealed(cache, batch.block_tables[cache.sealed_group])
        numbers = (spec.scale, spec.window or 0, spec.soft_cap or 0.0)
        rows, described = describe_rows(queries), describe_cache(cache)
        self.table.attention(TYPES[queries.dtype], rows, described, sealed, ragged, numbers, y.data_ptr())
        return y

    def multiply_registers(self, dtype: torch.dtype, rounds: int) -> int:
        """Multiply and add in registers only, so many rounds on every thread; how many multiply-adds that was."""
        return self.table.multiply_registers(TYPES[dtype], rounds)

    def sweep(self, kind: int, data: Tensor) -> int:
        """Go through memory once, reading (0), writing (1) or copying one half to the other (2); bytes that moved."""
        self.table.sweep(kind, data.data_ptr(), data.nbytes)
        return data.nbytes


def check_product(x: Tensor, weight: PanelWeight) -> None:
    """Raises ValueError for rows that a weight cannot be multiplied with."""
    if x.shape[1] != weight.in_features or weight.dtype not in (x.dtype, torch.int8, torch.uint8):
        expected = f"a {weight.dtype} product over {weight.in_features} features"
        raise ValueError(f"{expected} cannot take {x.dtype} {list(x.shape)}")


def check_alike(x: Tensor | None, residual: Tensor) -> None:
    """Raises ValueError for rows that cannot be added to a residual."""
    if not residual.is_contiguous() or (
        x is not None and (x.shape != residual.shape or x.dtype != residual.dtype or not x.is_contiguous())
    ):
        shape = None if x is None else list(x.shape)
        raise ValueError(f"x {shape} and residual {list(residual.shape)} must be alike and contiguous")


def check_unpacking(form: VectorForm, plane: Tensor, blocks: Tensor, into: Tensor) -> None:
    """Raises ValueError for blocks that cannot be unpacked there."""
    if len(blocks) != len(into) or into.shape[1:].numel() != form.tokens * form.width or not into.is_contiguous():
        raise ValueError(f"{len(blocks)} blocks of {form} do not unpack into {list(into.shape)}, contiguous")
    if form.nbytes > plane.shape[1] or plane.stride(1) != 1 or blocks.dtype != torch.int64:
        raise ValueError(f"{form} takes {form.nbytes} bytes of a plane {list(plane.shape)}, and blocks of int64")
    if form.bits <= 8 and (form.tokens % 16 or form.group % 16):
        raise ValueError(f"{form}: tokens and elements that share a scale must be multiples of 16")


def check_unpacking_by(form: VectorForm, blocks: Tensor, factors: Tensor | None, order: Tensor | None) -> None:
    """Raises ValueError for factors or an order that blocks cannot be unpacked by."""
    if factors is not None and (
        factors.shape != (len(blocks), form.tokens) or factors.dtype != torch.float32 or not factors.is_contiguous()
    ):
        raise ValueError(f"factors {list(factors.shape)} must be [{len(blocks)}, {form.tokens}], float32, contiguous")
    if order is not None and (
        not form.by_channel or order.shape != (form.width,) or order.dtype != torch.int64 or not order.is_contiguous()
    ):
        raise ValueError(f"an order must be int64 [{form.width}], contiguous, and of vectors by channel")


def describe_rows(x: Tensor) -> tuple[int, int, int, int, int]:
    """Address, tokens, stride between tokens, heads and head size of x [T, h, D], whose tokens are contiguous."""
    tokens, heads, size = x.shape
    if x.stride(2) != 1 or (heads > 1 and x.stride(1) != size):
        raise ValueError(f"a token's heads must be contiguous; shape {list(x.shape)} has strides {x.stride()}")
    return x.data_ptr(), tokens, x.stride(0), heads, size


def describe_batch(batch: RaggedBatch, group: int) -> tuple[int, int, int, int, int, int, int]:
    """Sequences, addresses of their starts and positions, the group's table, its strides, and where sequences begin."""
    table = batch.block_tables[group]
    strides = table.stride(0), table.stride(1) if table.dim() == 3 else 0
    starts, positions = batch.query_starts.data_ptr(), batch.positions.data_ptr()
    return batch.context_lengths.shape[0], starts, positions, table.data_ptr(), *strides, address(batch.begins)


def describe_cache(cache: LayerCache) -> tuple[int, int, int, int, int, int, int]:
    """Addresses (the bias too), bytes between blocks, kv heads, head size and block size of one layer's exact blocks.

    Raises ValueError for an odd block size and for blocks that are not as `LayerCache` says.
    """
    keys, values = cache.keys, cache.values
    _, kv_heads, lanes, block_size, pair = keys.shape
    if block_size % 16:
        raise ValueError(f"the block size must be a multiple of 16, got {block_size}")
    if pair * keys.itemsize != 4:
        raise ValueError(f"a cache of {keys.dtype} must hold {4 // keys.itemsize} in a lane, got {pair}")
    stride = keys.stride(0)
    if stride != values.stride(0) or keys.stride()[1:] != (lanes * block_size * pair, block_size * pair, pair, 1):
        raise ValueError(f"a block's keys must be contiguous, and blocks equally far apart; strides {keys.stride()}")
    for plane in (cache.bias, cache.mass):
        if plane is not None and (plane.stride(0) * 4, plane.stride(1)) != (stride * keys.itemsize, block_size):
            raise ValueError(f"bias and mass must lie in their block, contiguous; strides {plane.stride()}")
    addresses = keys.data_ptr(), values.data_ptr(), address(cache.bias)
    return *addresses, stride * keys.itemsize, kv_heads, values.shape[3], block_size


def describe_sealed(cache: LayerCache, table: Tensor | None = None) -> tuple[int, int, int, int, int, int, int, int]:
    """Address, bytes between blocks, bits of keys and values, residual, first tokens, table and its width, of sealed
    blocks.

    Raises ValueError where there are none, or where their bytes are not what their form says.
    """
    if cache.sealed is None or cache.form is None:
        raise ValueError("this layer's cache has no sealed blocks")
    expected = cache.form.count_head_bytes(cache.values.shape[3], cache.keys.shape[3])
    if cache.sealed.shape[2] != expected or cache.sealed.stride()[1:] != (expected, 1):
        raise ValueError(f"sealed blocks {list(cache.sealed.shape)} need {expected} bytes a head, contiguous")
    bits = cache.form.key_bits, cache.form.value_bits
    width = 0 if table is None else table.shape[1]
    return cache.sealed.data_ptr(), cache.sealed.stride(0), *bits, cache.residual, cache.first, address(table), width
