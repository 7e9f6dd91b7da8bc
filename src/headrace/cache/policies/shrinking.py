"""What policies that make a sequence smaller have in common: what they see of it, how what they choose is kept.

Knows nothing of which tokens are worth keeping, or of when a sequence is made smaller: the batch says that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from headrace.cache.layout import CacheLayout, Shrink
from headrace.cache.policies.base import KVShape, LayerStep, Plane
from headrace.cache.policies.parameters import check_number
from headrace.core import InputError
from headrace.kernels.base import LayerCache, SealedForm
from headrace.kernels.reference import read_blocks


@dataclass(frozen=True, slots=True)
class Context:
    """One layer's part of what a sequence holds: S tokens, in their order. Tensors are float32.

    keys, values  [kv heads, S, D]
    mass          [kv heads, S] what the queries that count gave to each token
    queries       [S] how many of them have seen it
    bias          [kv heads, S] what is added to the scores of each; None: nothing
    end           tokens that the sequence has had in all
    """

    layer: int
    keys: Tensor
    values: Tensor
    mass: Tensor
    queries: Tensor
    bias: Tensor | None = None
    end: int = 0

    @property
    def length(self) -> int:
        return self.keys.shape[1]


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays: keys and values [kv heads, n, D], and what is added to scores [kv heads, n], if anything. Each head
    may keep others, all keep n."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None


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
        if cache.bias is not None:
            size, slots = cache.keys.shape[3], batch.slots[cache.group]
            cache.bias[slots // size, :, slots % size] = 0
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
    def keep_tokens(self, context: Context, count: int) -> Kept:
        """What stays of a context: exactly `count` tokens, fewer than it has, in the order of their positions."""

    def _shrink(self, step: LayerStep, sequence: int, dropped: int) -> None:
        """Keep some of a sequence that is about to lose so many blocks more."""
        cache, batch = step.cache, step.batch
        size, end = cache.keys.shape[3], int(batch.context_lengths[sequence])
        begin = 0 if batch.begins is None else int(batch.begins[sequence])
        blocks = batch.block_tables[cache.group][sequence, begin // size : -(-end // size)].long()
        keys, values = (each[:, : end - begin] for each in read_blocks(cache, blocks))
        mass, bias = (
            None if plane is None else join_heads(plane[blocks])[:, : end - begin] for plane in (cache.mass, cache.bias)
        )
        first = 0 if batch.observed is None else max(int(batch.observed[sequence]), 0)
        queries = end - torch.arange(begin, end, device=keys.device).clamp(min=first)
        none = keys.new_zeros(keys.shape[:2])
        context = Context(step.layer, keys, values, none if mass is None else mass, queries, bias, end)
        write_kept(cache, blocks[dropped:], self.keep_tokens(context, end - begin - dropped * size))


class Evicting(Shrinking):
    """A policy that keeps some tokens as they are, those of the highest scores."""

    def keep_tokens(self, context: Context, count: int) -> Kept:
        scores = self.score(context, count).expand(len(context.keys), -1)
        chosen = choose_highest(scores, count)[..., None].expand(-1, -1, context.keys.shape[2])
        return Kept(context.keys.gather(1, chosen), context.values.gather(1, chosen))

    @abstractmethod
    def score(self, context: Context, count: int) -> Tensor:
        """How much each token is worth to a kv head [kv heads or 1, S]: the `count` highest stay."""


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


def write_kept(cache: LayerCache, blocks: Tensor, kept: Kept) -> None:
    """Write what stays into blocks [n] from their beginning."""
    _, _, lanes, size, pair = cache.keys.shape
    rest = (0, 0, 0, len(blocks) * size - kept.keys.shape[1])
    keys, values = (functional.pad(each, rest).to(cache.keys.dtype) for each in (kept.keys, kept.values))
    cache.keys[blocks] = keys.view(len(keys), -1, size, lanes, pair).permute(1, 0, 3, 2, 4)
    cache.values[blocks] = values.view(len(keys), -1, size // pair, pair, lanes * pair).permute(1, 0, 2, 4, 3)
    if cache.bias is not None and kept.bias is not None:
        bias = functional.pad(kept.bias, rest[2:])
        cache.bias[blocks] = bias.view(len(bias), -1, size).transpose(0, 1)


def join_heads(plane: Tensor) -> Tensor:
    """Numbers of blocks [n, kv heads, block size] as [kv heads, tokens]."""
    return plane.transpose(0, 1).flatten(1)
