"""Reading sealed blocks that attention does not know: they are made exact again for the length of one call.

What a query reads is as with forms that attention knows: sealed before the block of token p - residual + 1, exact from
there. This takes longer than plain attention: every step unpacks all older blocks of each layer, and then reads them as
if they had never been sealed. Memory is what such policies save, not time.
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

# Writes sealed blocks, int64 [n], as exact keys and values, [n, ...] each and contiguous, as a cache has them.
Unpack = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class Share:
    """Some of a step's queries and the blocks that they read: `sealed` and `exact`, int64, in the order in which a
    scratch has them. The batch's table counts in the scratch."""

    queries: slice
    sealed: Tensor
    exact: Tensor
    batch: RaggedBatch


class Restorer:
    """Attention over blocks that are unpacked for it. What a step's layers have in common is found once."""

    def __init__(self) -> None:
        self._known: tuple[RaggedBatch, tuple[int, ...], list[Share]] | None = None

    def attend(self, step: LayerStep, unpack: Unpack) -> Tensor:
        """Attention [T, heads, D] of a step's queries, older blocks by `unpack`.

        Takes a scratch beside the KV budget: the blocks that the queries read of this one layer, exactly; at most
        SCRATCH_BLOCKS blocks, or those of the longest sequence if it has more.
        """
        shares = self._find_shares(step.batch, step.cache)
        if not shares:
            return step.kernels.attention(step.queries, replace(step.cache, sealed=None), step.batch, step.spec)
        outputs = []
        for share in shares:
            queries = step.queries[share.queries]
            outputs.append(step.kernels.attention(queries, restore(step.cache, share, unpack), share.batch, step.spec))
        return torch.cat(outputs)

    def _find_shares(self, batch: RaggedBatch, cache: LayerCache) -> list[Share]:
        # Exact groups and sealed ones are cut each for itself: a layer may have one of them in common with the next.
        place = cache.group, cache.sealed_group, cache.residual, len(cache.keys)
        if self._known is None or self._known[0] is not batch or self._known[1] != place:
            self._known = batch, place, plan_shares(batch, cache)
        return self._known[2]


def plan_shares(batch: RaggedBatch, cache: LayerCache) -> list[Share]:
    """What a layer's queries read, as many together as a scratch may hold the blocks of; none if nothing is read
    sealed."""
    borders = (batch.positions - cache.residual + 1).clamp(min=0) // cache.keys.shape[3]
    if batch.read_exactly or not bool(borders.any()):
        return []
    return [make_share(batch, rows, len(cache.keys)) for rows in cut_rows(make_rows(batch, cache, borders))]


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


def make_rows(batch: RaggedBatch, cache: LayerCache, borders: Tensor) -> Rows:
    """Rows of a batch whose queries [T] read so many blocks sealed."""
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


def make_share(batch: RaggedBatch, rows: Rows, count: int) -> Share:
    """The queries of some rows, for a cache of so many blocks. What several rows read is in the scratch once."""
    table, taken = rows.table, rows.table >= 0
    read = torch.zeros(2 * count, dtype=torch.bool, device=table.device)
    read[table[taken]] = True
    used = read.nonzero().flatten()
    scratch = torch.full(table.shape, -1, dtype=torch.int32, device=table.device)
    scratch[taken] = (read.cumsum(0) - 1)[table[taken]].int()
    queries = slice(int(rows.starts[0]), int(rows.starts[-1]))
    part = RaggedBatch(
        batch.token_ids[queries],
        batch.positions[queries],
        rows.starts - rows.starts[0],
        rows.contexts,
        (scratch,),
        (),
        batch.logit_rows[:0],
    )
    return Share(queries, used[used < count], used[used >= count] - count, part)


def restore(cache: LayerCache, share: Share, unpack: Unpack) -> LayerCache:
    """The scratch of a share."""
    older = len(share.sealed)
    keys, values = (each.new_empty(older + len(share.exact), *each.shape[1:]) for each in (cache.keys, cache.values))
    if older:
        unpack(share.sealed, keys[:older], values[:older])
    torch.index_select(cache.keys, 0, share.exact, out=keys[older:])
    torch.index_select(cache.values, 0, share.exact, out=values[older:])
    return LayerCache(keys, values)


def read_tokens(cache: LayerCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of exact blocks [n], float32 [n, block size, kv heads * D] each, contiguous."""
    keys = cache.keys[blocks.long()].permute(0, 3, 1, 2, 4).flatten(2)
    values = cache.values[blocks.long()].permute(0, 2, 4, 1, 3).flatten(1, 2).flatten(2)
    return keys.float().contiguous(), values.float().contiguous()
