"""What queries see of a paged cache, in plain torch: blocks read one after the other, and written."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from headrace.kernels.base import UNIT, AttentionSpec, LayerCache, RaggedBatch
from headrace.kernels.units import unpack_units


def see_context(
    cache: LayerCache, batch: RaggedBatch, spec: AttentionSpec, index: int, begin: int, context: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values, float32 [kv heads, C, D], that some query of a sequence reads, and what is added to its scores
    [kv heads or 1, T, C]: a bias, or -inf where a query does not read a token. Tokens that some read sealed and others
    exactly come twice."""
    size = cache.keys.shape[3]
    positions = batch.positions[int(batch.query_starts[index]) : int(batch.query_starts[index + 1])]
    oldest = torch.full_like(positions, begin)
    if spec.window is not None:
        oldest = torch.maximum(oldest, positions - spec.window + 1)
    exact = oldest
    if cache.sealed is not None and not batch.read_exactly:
        exact = torch.maximum(oldest, (positions - cache.residual + 1).clamp(min=0) // size * size)
    start, table = int(exact.min()) // size, batch.block_tables[cache.group][index]
    blocks = table[start : -(-context // size)].long()
    keys, values = (each[:, : context - start * size] for each in read_blocks(cache, blocks))
    places = torch.arange(start * size, context, device=positions.device)
    added = hide((places[None] > positions[:, None]) | (places[None] < exact[:, None]))
    if cache.bias is not None:
        added = added + join_planes(cache.bias, blocks)[..., : context - start * size]
    if cache.sealed is None or cache.form is None or batch.read_exactly or int(exact.max()) == begin:
        return keys, values, added
    # What comes before `exact`: first tokens as they were computed, then those that are sealed.
    end = int(exact.max()) // size
    head = min(max(begin, cache.first) // size, end)
    parts = [read_blocks(cache, table[begin // size : head].long())]
    hidden = hide(torch.arange(begin, end * size, device=positions.device)[None] >= exact[:, None])
    if head < end:
        blocks = batch.block_tables[cache.sealed_group][index, head:end].long()
        units = cache.sealed[blocks].transpose(0, 1).reshape(keys.shape[0], len(blocks) * size // UNIT, -1)
        parts.append(unpack_units(units, cache.form, cache.values.shape[3]))
        if cache.sealed_bias is not None:
            hidden = hidden + functional.pad(join_planes(cache.sealed_bias, blocks), (head * size - begin, 0))
    parts.append((keys, values))
    keys, values = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    return keys, values, torch.cat([each.expand(len(keys), -1, -1) for each in (hidden, added)], 2)


def hide(hidden: Tensor) -> Tensor:
    """-inf where hidden [T, C], else 0: float32 [1, T, C]."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)[None]


def join_planes(plane: Tensor, blocks: Tensor) -> Tensor:
    """Numbers of blocks [n] one after the other, float32 [kv heads, 1, n * block size]."""
    return plane[blocks].transpose(0, 1).flatten(1)[:, None]


def take_head(cache: LayerCache, head: int) -> LayerCache:
    """The blocks of one kv head, exact ones in group 0 and sealed ones in group 1."""
    own = slice(head, head + 1)
    return replace(
        cache,
        keys=cache.keys[:, own],
        values=cache.values[:, own],
        group=0,
        sealed=None if cache.sealed is None else cache.sealed[:, own],
        sealed_group=1,
        bias=None if cache.bias is None else cache.bias[:, own],
        sealed_bias=None if cache.sealed_bias is None else cache.sealed_bias[:, own],
    )


def read_blocks(cache: LayerCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of exact blocks [n] one after the other, float32 [kv heads, n * block size, D] each."""
    # [blocks, kv heads, lanes, block size, pair] to [kv heads, tokens, D], and the values likewise
    keys = cache.keys[blocks].permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
    values = cache.values[blocks].permute(1, 0, 2, 4, 3).flatten(1, 3)
    return keys.float(), values.float()


def write_slots(cache: LayerCache, blocks: Tensor, first: int, keys: Tensor, values: Tensor) -> None:
    """Write keys and values [kv heads, n, D] into the slots from `first` on of these blocks, int64."""
    heads, count, _ = keys.shape
    _, _, lanes, size, pair = cache.keys.shape
    slots = torch.arange(first, first + count, device=blocks.device)
    blocks, offsets = blocks[slots // size], slots % size
    cache.keys[blocks, :, :, offsets] = keys.transpose(0, 1).reshape(count, heads, lanes, pair).to(cache.keys.dtype)
    cache.values[blocks, :, offsets // pair, :, offsets % pair] = values.transpose(0, 1).to(cache.values.dtype)
