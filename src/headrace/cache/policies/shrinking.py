"""What policies that make a sequence smaller have in common: what they see of it, how what they choose is kept.

Knows nothing of which tokens are worth keeping, or of when a sequence is made smaller: the batch says that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headrace.cache.layout import CacheLayout, Shrink
from headrace.cache.policies.base import KVShape, LayerStep, Plane
from headrace.cache.policies.parameters import check_number
from headrace.core import InputError
from headrace.kernels.base import LayerCache, RaggedBatch, SealedForm


@dataclass(frozen=True, slots=True)
class Context:
    """What a policy knows of the S tokens that a sequence holds in one layer, in their order.

    mass     float32 [kv heads, S], what the queries that count gave to each token
    queries  int64 [S], how many of them have seen it
    end      tokens that the sequence has had in all
    """

    layer: int
    mass: Tensor
    queries: Tensor
    end: int

    @property
    def length(self) -> int:
        return self.mass.shape[1]


class Shrinking(ABC):
    """See `KVPolicy`. All of a prompt is exact while it is computed, and its last token still sees all of it; then n
    tokens stay for what is generated. That is all kept, or with `every` made smaller in the same way again and again.
    Layers with sliding windows stay as they are.

    A kept key keeps the rotation of its own position. What stays depends on later tokens too, so prefixes are not
    shared. Where blocks are dropped whole, up to a block more than was asked for stays.
    """

    form: SealedForm | None = None
    residual = 1

    def __init__(
        self, name: str, keep: float, every: int, queries: int | None = 0, planes: tuple[Plane, ...] = ()
    ) -> None:
        """keep: a share of a sequence's tokens below 1, or so many of them. every: at each length that is a multiple of
        it output is made smaller too, 0: never. queries: attention of so many last ones is counted, None of all; of any
        only where "mass" is among the planes."""
        if isinstance(keep, float) and keep >= 1:
            raise InputError(f"kv {name}: keep must be a share below 1 or a whole number of tokens, got {keep!r}")
        check_number(name, "keep", keep, 0.001, 1e9, whole=False)
        check_number(name, "every", every, 0, 2**30)
        self.name = name
        self.shrink = Shrink(keep, every, queries)
        self.planes = planes

    def arrange(self, shape: KVShape, block_size: int) -> CacheLayout:
        if None not in shape.windows:
            raise InputError("every layer of this model has a sliding window: there is nothing to shrink; use kv plain")
        if self.shrink.every % block_size:
            raise InputError(
                f"kv {self.name}: every must be a multiple of the block size, {block_size}, got {self.shrink.every}"
            )
        layer_bytes = shape.count_layer_bytes(block_size, len(self.planes))
        layout = CacheLayout.from_windows(shape.windows, block_size, layer_bytes)
        return replace(layout, shares_prefixes=False, shrink=self.shrink)

    def attend(self, step: LayerStep) -> Tensor:
        cache, batch = step.cache, step.batch
        if step.spec.window is not None:
            batch, cache = replace(batch, begins=None), replace(cache, bias=None)
            return step.kernels.attention(step.queries, cache, batch, step.spec)
        clear_bias(cache, batch)
        output = step.kernels.attention(step.queries, cache, batch, step.spec)
        if batch.observed is not None and cache.mass is not None:
            share = self.find_share(step.queries.shape[1] // cache.keys.shape[1])
            step.kernels.observe(step.queries, cache, batch, step.spec, share)
        if batch.shrinks is not None:
            for sequence, dropped in enumerate(batch.shrinks.tolist()):
                if dropped:
                    self._shrink(step, sequence, dropped)
        return output

    def find_share(self, heads: int) -> float:
        """How attention is counted, of so many query heads a kv head: see `Kernels.observe`. 0: weights are summed."""
        return 0.0

    @abstractmethod
    def keep_tokens(self, step: LayerStep, context: Context, blocks: Tensor, dropped: int) -> None:
        """Make a context smaller, which lies in these blocks [n] from their beginning: as many tokens as it has room
        for without the first `dropped` blocks, in the order of their positions, go where those end."""

    def _shrink(self, step: LayerStep, sequence: int, dropped: int) -> None:
        """Keep some of a sequence that is about to lose so many blocks more."""
        cache, batch = step.cache, step.batch
        size, end = cache.keys.shape[3], int(batch.context_lengths[sequence])
        begin = 0 if batch.begins is None else int(batch.begins[sequence])
        blocks = batch.block_tables[cache.group][sequence, begin // size : -(-end // size)].long()
        if cache.mass is None:
            mass = torch.zeros(cache.keys.shape[1], end - begin, device=blocks.device)
        else:
            mass = join_heads(cache.mass[blocks])[:, : end - begin]
        first = 0 if batch.observed is None else max(int(batch.observed[sequence]), 0)
        queries = end - torch.arange(begin, end, device=blocks.device).clamp(min=first)
        self.keep_tokens(step, Context(step.layer, mass, queries, end), blocks, dropped)


class Evicting(Shrinking):
    """A policy that keeps some tokens as they are, those of the highest scores."""

    def keep_tokens(self, step: LayerStep, context: Context, blocks: Tensor, dropped: int) -> None:
        into = dropped * step.cache.keys.shape[3]
        count = context.length - into
        chosen = choose_highest(self.score(context, count).expand(len(context.mass), -1), count)
        step.kernels.move_tokens(step.cache, blocks, chosen, into)

    @abstractmethod
    def score(self, context: Context, count: int) -> Tensor:
        """How much each token is worth to a kv head [kv heads or 1, S]: the `count` highest stay."""


def clear_bias(cache: LayerCache, batch: RaggedBatch) -> None:
    """Where scores have a bias, a step's own tokens have none."""
    if cache.bias is not None:
        size, slots = cache.keys.shape[3], batch.slots[cache.group]
        cache.bias[slots // size, :, slots % size] = 0


def choose_highest(scores: Tensor, count: int) -> Tensor:
    """Where scores [kv heads, S] are highest, int64 [kv heads, count] ascending; of equals the first ones."""
    order = torch.argsort(scores, stable=True, dim=-1, descending=True)
    return order[:, :count].sort(-1).values


def protect(scores: Tensor, count: int, sinks: int, recent: int) -> Tensor:
    """The scores with the first `sinks` and the last `recent` tokens above all others; where `count` has no room for
    both, fewer recent ones are."""
    sinks = min(sinks, count)
    recent = min(recent, count - sinks)
    scores = scores.clone()
    scores[..., :sinks] = torch.inf
    scores[..., scores.shape[-1] - recent :] = torch.inf
    return scores


def join_heads(plane: Tensor) -> Tensor:
    """Numbers of blocks [n, kv heads, block size] as [kv heads, tokens]."""
    return plane.transpose(0, 1).flatten(1)
