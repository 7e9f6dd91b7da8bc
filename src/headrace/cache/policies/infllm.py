"""InfLLM-v2 (arXiv 2509.24663), without training: all keys and values stay, an output token reads the likeliest blocks.

As in section 3 of the paper: means of 32 keys, one every 16 tokens, stand for a block when a query chooses what it
reads; the first blocks and the newest ones are always read. Here a block is the cache's, the softmax over the means is
computed from all of them rather than estimated from coarser ones, and prompts are read whole: which of a sequence's
tokens choose depends on where they are, not on chunks. So nothing is saved while a prompt is computed. Prompts are
shared, output is not: it was computed from what was chosen.

With kivi the older blocks are sealed, and those of them that are chosen are read as they are; means are of exact keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from headrace.cache.layout import CacheGroup, CacheLayout
from headrace.cache.policies.base import KVShape, LayerStep, Plane
from headrace.cache.policies.parameters import check_number
from headrace.cache.policies.sealing import arrange_sealed, seal_filled
from headrace.cache.policies.selecting import Parted, find_outputs, find_owners, part
from headrace.core import InputError
from headrace.kernels.base import AttentionSpec, LayerCache, RaggedBatch, SealedForm

# Tokens of which a mean is made, and from one mean to the next.
SPAN, STRIDE = 32, 16
# Blocks whose means are looked at in one go: more would take much memory while a long output is computed again.
MOST_BLOCKS = 1 << 14


@dataclass(frozen=True, slots=True)
class Plan:
    """What of a batch is the same for all layers.

    owners   int64 [T]: each token's sequence
    ends     int64 [n]: the tokens with which a mean is complete
    choosing int64 [R]: the tokens that choose what they read
    parted   the batch in which these stand alone, their positions counted over chosen blocks; None if there are none
    """

    batch: RaggedBatch
    owners: Tensor
    ends: Tensor
    choosing: Tensor
    parted: Parted | None


class InfLLM:
    """See `KVPolicy`. Layers with sliding windows are read as they are."""

    planes: tuple[Plane, ...] = ()

    def __init__(self, topk: int = 8, init: int = 1, local: int = 2, dense: int = 0) -> None:
        """topk: blocks that a query chooses, each kv head its own, beside the first `init` and the newest `local` ones,
        its own included. dense: contexts of so many tokens, or fewer, are read whole."""
        check_number("infllm", "topk", topk, 1, 65536)
        check_number("infllm", "init", init, 0, 65536)
        check_number("infllm", "local", local, 1, 65536)
        check_number("infllm", "dense", dense, 0, 1 << 30)
        self.topk, self.init, self.local, self.dense = topk, init, local, dense
        self.form: SealedForm | None = None
        self.residual = 1
        self._plan: Plan | None = None

    def with_sealing(self, form: SealedForm, residual: int) -> InfLLM:
        """The same over blocks that are sealed in the form: a mean is of keys that are all exact when its last one is
        computed. Raises InputError where they are sealed already."""
        if self.form is not None:
            raise InputError("kv infllm: its blocks are rounded already; use kivi once")
        combined = InfLLM(self.topk, self.init, self.local, self.dense)
        combined.form, combined.residual = form, max(residual, SPAN)
        return combined

    @property
    def most(self) -> int:
        """Blocks that an output token reads at most."""
        return self.init + self.topk + self.local

    def arrange(self, shape: KVShape, block_size: int) -> CacheLayout:
        if block_size % STRIDE:
            raise InputError(f"block_size {block_size} has no means of keys: kv infllm needs a multiple of {STRIDE}")
        means = block_size // STRIDE * shape.kv_heads * shape.head_size * shape.dtype.itemsize
        exact_bytes, most_read = shape.count_layer_bytes(block_size), max(self.dense, self.most * block_size)
        if self.form is None:
            layout = CacheLayout.from_windows(shape.windows, block_size, exact_bytes + means)
            return replace(layout, shares_output=False, most_read=most_read)
        newest = -(-(self.residual - 1) // block_size) + 1
        if self.local < newest:
            raise InputError(
                f"kv infllm: with kivi the newest {self.residual} tokens are read exactly, in up to {newest} blocks of "
                f"{block_size}: local must be at least {newest}, got {self.local}"
            )
        sealed_bytes = shape.kv_heads * self.form.count_head_bytes(shape.head_size, block_size) + means
        layout = arrange_sealed(shape, block_size, sealed_bytes, CacheGroup((), self.residual, exact_bytes))
        return replace(layout, shares_output=False, most_read=most_read)

    def attend(self, step: LayerStep) -> Tensor:
        batch, size = step.batch, step.cache.keys.shape[3]
        seal_filled(step)
        if step.spec.window is None:
            if self._plan is None or self._plan.batch is not batch:
                self._plan = self._make_plan(batch, size)
            write_means(step.cache, batch, self._plan)
            if self._plan.parted is not None:
                batch = self._choose(step, self._plan, self._plan.parted)
        return step.kernels.attention(step.queries, step.cache, batch, step.spec)

    def _make_plan(self, batch: RaggedBatch, size: int) -> Plan:
        owners, positions = find_owners(batch), batch.positions
        ends = ((positions % STRIDE == STRIDE - 1) & (positions >= SPAN - 1)).nonzero().flatten()
        chooses = find_outputs(batch, owners) & (positions >= max(self.dense, self.most * size))
        choosing = chooses.nonzero().flatten()
        if not len(choosing):
            return Plan(batch, owners, ends, choosing, None)
        # A query stands in the last of the blocks that it reads, wherever that is in the text.
        virtual = torch.where(chooses, (self.most - 1) * size + positions % size, positions)
        return Plan(batch, owners, ends, choosing, part(replace(batch, positions=virtual), owners, chooses))

    def _choose(self, step: LayerStep, plan: Plan, parted: Parted) -> RaggedBatch:
        """The parted batch with the blocks that each kv head of each part reads in this layer."""
        cache, kv_heads = step.cache, step.cache.keys.shape[1]
        size, table = cache.keys.shape[3], step.batch.block_tables[whole_group(cache)]
        chosen = []
        for rows in torch.split(plan.choosing, max(1, MOST_BLOCKS // table.shape[1])):
            contexts = step.batch.positions[rows].long() + 1
            counts = (contexts - 1) // size + 1
            blocks = table[plan.owners[rows], : int(counts.max())].long()
            scores = score_blocks(step.queries[rows], cache, blocks.clamp(min=0), contexts, step.spec)
            places = choose_blocks(scores, counts, self.topk, self.init, self.local)
            chosen.append(places)
        width = self.most if len(parted.alone) == len(parted.sequences) else table.shape[1]
        tables = list(step.batch.block_tables)
        for group in {cache.group, whole_group(cache)}:
            every = tables[group][parted.sequences, None].expand(-1, kv_heads, -1)
            own = every[parted.alone].gather(2, torch.cat(chosen))
            tables[group] = every[..., :width].contiguous()
            tables[group][parted.alone, :, : self.most] = own
        return replace(parted.batch, block_tables=tuple(tables))


def whole_group(cache: LayerCache) -> int:
    """The cache group that has all of a sequence's blocks, and in them its means."""
    return cache.group if cache.sealed is None else cache.sealed_group


def view_means(cache: LayerCache) -> Tensor:
    """The means that are complete with a token of a block: [blocks, kv heads, block size / STRIDE, D].

    A mean lies in the block of its last token, so what a block holds depends on its tokens and those before them. The
    first place of a text's first block is not used.
    """
    _, kv_heads, lanes, size, pair = cache.keys.shape
    assert cache.extra is not None
    return cache.extra.view(cache.keys.dtype).view(-1, kv_heads, size // STRIDE, lanes * pair)


def write_means(cache: LayerCache, batch: RaggedBatch, plan: Plan) -> None:
    """Write the means that are complete with this step's tokens."""
    if not len(plan.ends):
        return
    table, size = batch.block_tables[cache.group], cache.keys.shape[3]
    keys = cache.keys.view(*cache.keys.shape[:3], size // STRIDE, STRIDE, -1)
    owners, positions = plan.owners[plan.ends], batch.positions[plan.ends].long()
    total = torch.zeros(1, dtype=torch.float64, device=positions.device)
    for each in range(SPAN // STRIDE):
        places = positions - each * STRIDE
        blocks, parts = table[owners, places // size].long(), places % size // STRIDE
        # [n, kv heads, lanes, STRIDE, pair]; in double precision the order of a sum leaves no trace.
        total = total + keys[blocks, :, :, parts].double().sum(3)
    table, parts = batch.block_tables[whole_group(cache)], positions % size // STRIDE
    blocks = table[owners, positions // size].long()
    view_means(cache)[blocks, :, parts] = (total / SPAN).flatten(2).to(cache.keys.dtype)


def score_blocks(queries: Tensor, cache: LayerCache, blocks: Tensor, contexts: Tensor, spec: AttentionSpec) -> Tensor:
    """How likely queries [R, heads, D] read their sequences' blocks [R, n]: float64 [R, kv heads, n].

    contexts [R] are the tokens that each query sees. The softmax over means is summed over the query heads that share
    a kv head; a block has the largest share of the means that touch it.
    """
    assert cache.extra is not None
    _, heads, parts, size = view_means(cache).shape
    count = blocks.shape[1]
    # Rows are copied several times faster whole than by an index over four dimensions.
    rows = cache.extra.view(cache.keys.dtype).index_select(0, blocks.flatten())
    means = rows.view(-1, count, heads, parts, size).transpose(1, 2).flatten(2, 3).double()
    grouped = queries.reshape(len(queries), heads, -1, size).double()
    # In double precision a query chooses the same blocks in any batch.
    scores = grouped @ means.transpose(2, 3) * spec.scale
    ends = torch.arange(1, count * parts + 1, device=blocks.device) * STRIDE
    there = (ends >= SPAN) & (ends <= contexts[:, None])
    shares = scores.masked_fill(~there[:, None, None], -torch.inf).softmax(-1).sum(2)
    shares = shares.view(len(shares), -1, count, parts)
    # The first mean of the following block begins in this one.
    following = functional.pad(shares[:, :, 1:, 0], (0, 1))
    return torch.maximum(shares.amax(-1), following)


def choose_blocks(scores: Tensor, counts: Tensor, topk: int, init: int, local: int) -> Tensor:
    """Places of the blocks that are read, ascending: int64 [R, kv heads, init + topk + local].

    scores [R, kv heads, n]; a sequence has counts [R] blocks, more than are chosen.
    """
    places = torch.arange(scores.shape[2], device=scores.device)
    free = (places >= init) & (places < counts[:, None] - local)
    # A mean that touches two blocks often gives both the same score: the order of equals must not be left to chance.
    best = scores.masked_fill(~free[:, None], -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    newest = counts[:, None] - local + places[:local]
    forced = torch.cat([places[:init].expand(len(counts), -1), newest], 1)
    return torch.cat([forced[:, None].expand(-1, scores.shape[1], -1), best], 2).sort(-1).values
