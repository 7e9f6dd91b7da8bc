"""Reading sealed blocks that no kernel knows: they are made exact again for the length of one call.

What a query reads is as with forms that kernels know: sealed before the block of token p - residual + 1, exact from
there. This takes several times as long as plain attention: every step unpacks all older blocks of each layer, and then
reads them as if they had never been sealed. Memory is what such policies save, not time.
Knows nothing of how a policy seals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headrace.cache.policies.base import LayerStep
from headrace.kernels.base import LayerCache, RaggedBatch

# Most blocks of a scratch, as long as one sequence needs no more.
SCRATCH_BLOCKS = 1024

# Keys and values [n, block size, kv heads * D] of sealed blocks, int64 [n].
Unpack = Callable[[Tensor], tuple[Tensor, Tensor]]


def attend_restored(step: LayerStep, unpack: Unpack) -> Tensor:
    """Attention [T, heads, D] of a step's queries, older blocks by `unpack`.

    Takes a scratch beside the KV budget: the blocks that the queries read of this one layer, exactly, and about three
    times that while they are unpacked; at most SCRATCH_BLOCKS blocks, or those of the longest sequence if it has more.
    """
    cache, batch = step.cache, step.batch
    size = cache.keys.shape[3]
    borders = (batch.positions - cache.residual + 1).clamp(min=0) // size
    if batch.read_exactly or not bool(borders.any()):
        return step.kernels.attention(step.queries, replace(cache, sealed=None), batch, step.spec)
    outputs = []
    for rows in cut_rows(make_rows(step, borders)):
        keys, values, table = restore(cache, rows.table, unpack)
        starts = rows.starts - rows.starts[0]
        span = slice(int(rows.starts[0]), int(rows.starts[-1]))
        part = RaggedBatch(
            batch.token_ids[span],
            batch.positions[span],
            starts,
            rows.contexts,
            (table,),
            (),
            batch.logit_rows[:0],
        )
        outputs.append(step.kernels.attention(step.queries[span], LayerCache(keys, values), part, step.spec))
    return torch.cat(outputs)


@dataclass(frozen=True, slots=True)
class Rows:
    """Neighbouring queries of a sequence that read the same blocks sealed, R times.

    starts    int32 [R + 1]: row r owns queries starts[r] to starts[r + 1]
    contexts  int32 [R]: tokens that the row's last query reads
    table     int64 [R, most blocks]: sealed blocks by their ids, then exact ones by theirs plus the cache's count of
              blocks; -1 right of a row's last
    """

    starts: Tensor
    contexts: Tensor
    table: Tensor


def make_rows(step: LayerStep, borders: Tensor) -> Rows:
    """Rows of a step whose queries [T] read so many blocks sealed."""
    cache, batch = step.cache, step.batch
    lengths = batch.query_starts.diff()
    owners = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    begins = torch.ones_like(owners, dtype=torch.bool)
    begins[1:] = (owners[1:] != owners[:-1]) | (borders[1:] != borders[:-1])
    first = begins.nonzero().flatten()
    starts = torch.cat([first, first.new_tensor([len(owners)])])
    contexts = batch.positions[starts[1:] - 1] + 1
    sealed, exact = (batch.block_tables[group][owners[first]].long() for group in (cache.sealed_group, cache.group))
    places = torch.arange(exact.shape[1], device=exact.device)[None]
    table = torch.where(places < borders[first][:, None], sealed, exact + len(cache.keys))
    counts = -(-contexts // cache.keys.shape[3])
    return Rows(starts.int(), contexts, table.masked_fill(places >= counts[:, None], -1))


def cut_rows(rows: Rows) -> Iterator[Rows]:
    """The rows in order, as many together as a scratch may hold the blocks of."""
    counts = (rows.table >= 0).sum(1).tolist()
    start = held = 0
    for row, count in enumerate(counts):
        if row > start and held + count > SCRATCH_BLOCKS:
            yield Rows(rows.starts[start : row + 1], rows.contexts[start:row], rows.table[start:row])
            start, held = row, 0
        held += count
    yield Rows(rows.starts[start:], rows.contexts[start:], rows.table[start:])


def restore(cache: LayerCache, table: Tensor, unpack: Unpack) -> tuple[Tensor, Tensor, Tensor]:
    """A scratch of the blocks in a table of `Rows`, laid out as exact blocks are, and the table of their places in it,
    int32. What several rows read is there once."""
    taken = table >= 0
    count = len(cache.keys)
    read = torch.zeros(2 * count, dtype=torch.bool, device=table.device)
    read[table[taken]] = True
    used = read.nonzero().flatten()
    sealed, exact = used[used < count], used[used >= count] - count
    older = unpack(sealed) if len(sealed) else None
    keys, values = cache.keys[exact], cache.values[exact]
    if older is not None:
        keys = torch.cat([lay_keys(older[0], cache), keys])
        values = torch.cat([lay_values(older[1], cache), values])
    scratch = torch.full(table.shape, -1, dtype=torch.int32, device=table.device)
    scratch[taken] = (read.cumsum(0) - 1)[table[taken]].int()
    return keys, values, scratch


def lay_keys(keys: Tensor, cache: LayerCache) -> Tensor:
    """Keys [n, block size, kv heads * D] as exact blocks have them."""
    _, heads, lanes, size, pair = cache.keys.shape
    return keys.to(cache.keys.dtype).view(-1, size, heads, lanes, pair).permute(0, 2, 3, 1, 4).contiguous()


def lay_values(values: Tensor, cache: LayerCache) -> Tensor:
    """Values [n, block size, kv heads * D] as exact blocks have them."""
    _, heads, lanes, head_size, pair = cache.values.shape
    return values.to(cache.values.dtype).view(-1, lanes, pair, heads, head_size).permute(0, 3, 1, 4, 2).contiguous()


def read_tokens(cache: LayerCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of exact blocks [n], float32 [n, block size, kv heads * D] each, contiguous."""
    keys = cache.keys[blocks.long()].permute(0, 3, 1, 2, 4).flatten(2)
    values = cache.values[blocks.long()].permute(0, 2, 4, 1, 3).flatten(1, 2).flatten(2)
    return keys.float().contiguous(), values.float().contiguous()
