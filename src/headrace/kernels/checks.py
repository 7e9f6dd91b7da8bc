"""What tensors must be like before their addresses go to the extension, which trusts what it is told.

Each function raises ValueError, naming what is wrong. They run thousands of times a second: comparisons of shapes and
dtypes, never of contents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.base import LARGEST_HEAD, LARGEST_SEALED_BLOCK, UNIT, HeadSpec, LayerCache, SealedForm
from headrace.kernels.panels import PanelWeight
from headrace.kernels.shadows import CHUNK, ShadowRows, count_place_rows, count_rows
from headrace.kernels.vectors import VectorForm

FLOATS = (torch.float32, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8)


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """For anything but a contiguous tensor of this dtype and shape."""
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        found = f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
        raise ValueError(f"{name} must be {dtype} {list(shape)}, contiguous, not {found}")


def check_product(x: Tensor, weight: PanelWeight, dtype: torch.dtype | None = None) -> None:
    """For rows that a weight cannot be multiplied with, and a result of what is no floating-point type."""
    kinds = FLOATS if weight.dtype in INTEGERS else (weight.dtype,)
    if x.dim() != 2 or x.shape[1] != weight.in_features or x.dtype not in kinds:
        expected = f"a {weight.dtype} product over {weight.in_features} features"
        raise ValueError(f"{expected} cannot take {x.dtype} {list(x.shape)}")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"a product is float32 or bfloat16, not {dtype}")


def check_norm(x: Tensor, weight: Tensor) -> None:
    """For rows and a norm's weight that do not fit."""
    if x.dim() != 2 or x.dtype not in FLOATS:
        raise ValueError(f"a norm takes rows of float32 or bfloat16, not {x.dtype} {list(x.shape)}")
    check_tensor("a norm's weight", weight, torch.float32, (x.shape[1],))


def check_alike(x: Tensor | None, residual: Tensor) -> None:
    """For rows that cannot be added to a residual."""
    if not residual.is_contiguous() or (
        x is not None and (x.shape != residual.shape or x.dtype != residual.dtype or not x.is_contiguous())
    ):
        shape = None if x is None else list(x.shape)
        raise ValueError(f"x {shape} and residual {list(residual.shape)} must be alike and contiguous")


def check_heads(
    fused: Tensor, spec: HeadSpec, rotation: tuple[Tensor, Tensor], cache: LayerCache, slots: Tensor
) -> None:
    """For queries, keys and values that cannot go into a cache, or be normed and rotated so."""
    if fused.dim() != 3 or not fused.is_contiguous() or fused.dtype != cache.keys.dtype:
        shape = f"{fused.dtype} {list(fused.shape)}"
        raise ValueError(f"queries, keys and values {shape} must be contiguous, of the cache's {cache.keys.dtype}")
    tokens, every, size = fused.shape
    if size != cache.values.shape[3] or every < 2 * cache.values.shape[1]:
        raise ValueError(f"queries, keys and values {list(fused.shape)} are not those of a cache {cache.values.shape}")
    check_tensor("cos", rotation[0], torch.float32, (tokens, size // 2))
    check_tensor("sin", rotation[1], torch.float32, (tokens, size // 2))
    check_tensor("slots", slots, torch.int64, (tokens,))
    for norm in (spec.query_norm, spec.key_norm):
        if norm is not None:
            check_tensor("a norm's weight", norm, torch.float32, (size,))


def check_queries(queries: Tensor, cache: LayerCache, expected: int) -> None:
    """For queries [T, heads, D] that a cache cannot answer, or that are not of so many tokens."""
    tokens, heads, size = queries.shape
    kv_heads = cache.values.shape[1]
    if queries.dtype != cache.keys.dtype or size != cache.values.shape[3] or heads % kv_heads:
        shapes = f"{queries.dtype} {list(queries.shape)}, and {cache.keys.dtype} {list(cache.values.shape)}"
        raise ValueError(f"queries must have the dtype and head size of the cache, its kv heads or multiples; {shapes}")
    if tokens != expected:
        raise ValueError(f"queries are of {tokens} tokens, and the batch has {expected}")


def check_table(table: Tensor, sequences: int, kv_heads: int) -> None:
    """For what does not say of each sequence, or of each of its kv heads, where its blocks are."""
    shape = table.shape
    if (
        table.dtype != torch.int32
        or shape[0] != sequences
        or table.stride(-1) != 1
        or shape[1:-1] not in ((), (kv_heads,))
    ):
        raise ValueError(f"a table {table.dtype} {list(shape)} is not one of int32 for {sequences} sequences")


def check_plane(plane: Tensor, shape: tuple[int, int, int], stride: int) -> None:
    """For a bias or mass that is not of this shape, in blocks `stride` bytes apart."""
    if plane.dtype != torch.float32 or plane.shape != shape or plane.stride()[1:] != (shape[2], 1):
        raise ValueError(f"bias and mass must be float32 {list(shape)}, not {plane.dtype} {list(plane.shape)}")
    if shape[0] > 1 and plane.stride(0) * 4 != stride:
        raise ValueError(f"bias and mass must lie in their block, contiguous; strides {plane.stride()}")


def check_sealing(form: SealedForm, cache: LayerCache) -> None:
    """For a cache whose blocks cannot lie sealed in this form."""
    size, head = cache.keys.shape[3], cache.values.shape[3]
    if size % UNIT or size > LARGEST_SEALED_BLOCK or head % UNIT or head > LARGEST_HEAD:
        raise ValueError(
            f"blocks of {size} tokens and heads of {head} cannot be sealed: they must be multiples of {UNIT}, "
            f"at most {LARGEST_SEALED_BLOCK} and {LARGEST_HEAD}"
        )
    expected = form.count_head_bytes(head, size)
    sealed = cache.sealed
    assert sealed is not None
    if sealed.dtype != torch.uint8 or sealed.shape[1:] != (cache.keys.shape[1], expected):
        raise ValueError(f"sealed blocks {sealed.dtype} {list(sealed.shape)} need {expected} bytes of uint8 a head")
    if sealed.stride()[1:] != (expected, 1):
        raise ValueError(f"a block's sealed heads must be contiguous; strides {sealed.stride()}")
    if cache.sealed_bias is not None:
        check_plane(cache.sealed_bias, (len(sealed), cache.keys.shape[1], size), sealed.stride(0))


def check_moving(cache: LayerCache, blocks: Tensor, slots: Tensor, into: int) -> None:
    """For tokens that cannot be moved within these blocks."""
    if blocks.dim() != 1 or slots.dim() != 2 or slots.dtype != torch.int64 or slots.shape[0] != cache.keys.shape[1]:
        raise ValueError(f"slots {slots.dtype} {list(slots.shape)} must be int64, a row for each kv head")
    if not 0 <= into <= len(blocks) * cache.keys.shape[3] - slots.shape[1]:
        raise ValueError(f"{slots.shape[1]} tokens from {into} on do not fit into {len(blocks)} blocks")


def check_unpacking(form: VectorForm, plane: Tensor, blocks: Tensor, into: Tensor) -> None:
    """For blocks that cannot be unpacked there."""
    if len(blocks) != len(into) or into.shape[1:].numel() != form.tokens * form.width or not into.is_contiguous():
        raise ValueError(f"{len(blocks)} blocks of {form} do not unpack into {list(into.shape)}, contiguous")
    if into.dim() != 5 or into.dtype not in FLOATS or form.width % (1 if form.by_channel else into.shape[3]):
        raise ValueError(f"{form} unpacks into keys or values of float32 or bfloat16, not {into.dtype} {into.shape}")
    if form.nbytes > plane.shape[1] or plane.dtype != torch.uint8 or plane.stride(1) != 1:
        raise ValueError(f"{form} takes {form.nbytes} bytes of a plane {plane.dtype} {list(plane.shape)}")
    if blocks.dtype != torch.int64:
        raise ValueError(f"{form} takes blocks of int64, not {blocks.dtype}")
    if form.bits <= 8 and (form.tokens % 16 or form.group % 16 or form.width % form.group):
        raise ValueError(f"{form}: tokens and elements that share a scale must be multiples of 16, and groups whole")


def check_unpacking_by(form: VectorForm, blocks: Tensor, factors: Tensor | None, order: Tensor | None) -> None:
    """For factors or an order that blocks cannot be unpacked by."""
    if factors is not None:
        check_tensor("factors", factors, torch.float32, (len(blocks), form.tokens))
    if order is not None:
        if not form.by_channel:
            raise ValueError("an order must be of vectors by channel")
        check_tensor("an order", order, torch.int64, (form.width,))


def check_shadow(shadow: ShadowRows, cache: LayerCache, into: Tensor, rope: tuple[Tensor, Tensor]) -> None:
    """For chunks that cannot be chosen of this shadow, or not be written there."""
    kv_heads, head, size = cache.keys.shape[1], cache.values.shape[3], cache.keys.shape[3]
    blocks, chunks = shadow.rows.blocks, shadow.chunks
    if shadow.heads != kv_heads or not 0 < shadow.count <= chunks or shadow.rows.rows.dtype != cache.keys.dtype:
        raise ValueError(f"a shadow of {shadow.heads} heads, {shadow.count} of {chunks} chunks, is not of this cache")
    check_tensor("blocks", blocks, torch.int32, (len(blocks),))
    check_tensor("blocks to write into", into, torch.int32, (len(into),))
    needed = count_place_rows(kv_heads * shadow.count, head * cache.keys.itemsize) + kv_heads * (chunks + shadow.rank)
    needed += chunks * (count_rows(shadow.rank, head) + (kv_heads * CHUNK if shadow.values is None else 0))
    if needed > len(blocks) * 2 * kv_heads * size or len(into) * size < shadow.count * CHUNK:
        raise ValueError(f"{len(blocks)} blocks hold no shadow of {needed} rows, or {len(into)} not what it chooses")
    if shadow.values is not None:
        check_tensor("a shadow's values", shadow.values, cache.keys.dtype, (kv_heads, chunks, CHUNK, head))
    for each in rope:
        if each.dtype != torch.float32 or each.dim() != 2 or len(each) < chunks * CHUNK or not each.is_contiguous():
            raise ValueError(f"cos and sin must be float32 of {chunks * CHUNK} positions, not {list(each.shape)}")
        if each.shape[1] != head // 2:
            raise ValueError(f"cos and sin must have {head // 2} numbers each, not {each.shape[1]}")
