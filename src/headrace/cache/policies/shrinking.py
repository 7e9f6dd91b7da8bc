"""What policies that shrink a prompt at its end have in common: what they see of it, how what they choose is kept.

Knows nothing of which tokens are worth keeping, or of when a prompt ends: the batch says that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from headrace.cache.layout import CacheLayout, Shrink
from headrace.cache.policies.base import KVShape, LayerStep, Plane
from headrace.cache.policies.parameters import check_number
from headrace.core import InputError
from headrace.kernels.base import AttentionSpec, LayerCache, SealedForm
from headrace.kernels.reference import read_blocks

# Queries whose attention is computed at once.
TILE = 64


@dataclass(frozen=True, slots=True)
class Prompt:
    """One layer's part of a prompt of S tokens that is computed, all of it exact. Tensors are float32.

    keys, values  [kv heads, S, D]
    mass          [kv heads, S] what the last `window` queries of the prompt gave to each token
    """

    layer: int
    keys: Tensor
    values: Tensor
    mass: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[1]


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays of a prompt: keys and values [kv heads, n, D], and what is added to scores [kv heads, n], if anything.
    Each head may keep others, all keep n."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None


class _Chunk(NamedTuple):
    """A chunk of a prompt: whose, which rows of the step, tokens up to its end, the first query that counts, and the
    blocks that are dropped after it."""

    sequence: int
    rows: slice
    context: int
    first: int
    dropped: int


class Shrinking(ABC):
    """See `KVPolicy`. All of a prompt is exact while it is computed, and its last token still sees all of it; then n
    tokens stay for what is generated, which is all kept. Layers with sliding windows stay as they are.

    A kept key keeps the rotation of its own position. What stays depends on the prompt's later tokens too, so prefixes
    are not shared. Where blocks are dropped whole, up to a block more than was asked for stays.
    """

    form: SealedForm | None = None
    residual = 1

    def __init__(self, name: str, keep: float, window: int | None = 0, planes: tuple[Plane, ...] = ()) -> None:
        """keep: a share of the prompt below 1, or so many tokens. window: attention of so many last queries of a prompt
        is counted, None of all; of more than one only where "mass" is among the planes, for they may come in several
        chunks."""
        if isinstance(keep, float) and keep >= 1:
            raise InputError(f"kv {name}: keep must be a share below 1 or a whole number of tokens, got {keep!r}")
        check_number(name, "keep", keep, 0.001, 1e9, whole=False)
        self.shrink = Shrink(keep)
        self.window = window
        self.planes = planes

    def arrange(self, shape: KVShape, block_size: int) -> CacheLayout:
        if None not in shape.windows:
            raise InputError("every layer of this model has a sliding window: there is nothing to shrink; use kv plain")
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
        if batch.shrinks is not None or "mass" in self.planes:
            for chunk in self._find_chunks(step):
                self._look(step, chunk)
        return output

    def count_attention(self, weights: Tensor, seen: Tensor) -> Tensor:
        """What each query gives to each token [kv heads, Q, C], of its weights [kv heads, queries a kv head, Q, C] and
        of how many tokens it sees [Q]: all its weights' sum, unless a policy counts otherwise."""
        return weights.sum(1)

    @abstractmethod
    def keep_tokens(self, prompt: Prompt, count: int) -> Kept:
        """What stays of a prompt: exactly `count` tokens, fewer than it has, in the order of their positions."""

    def _find_chunks(self, step: LayerStep) -> Iterator[_Chunk]:
        """The chunks of prompts that end here, and those before whose attention counts."""
        batch, size = step.batch, step.cache.keys.shape[3]
        contexts, starts = batch.context_lengths.tolist(), batch.query_starts.tolist()
        prompts = contexts if batch.prompts is None else batch.prompts.tolist()
        shrinks = [0] * len(contexts) if batch.shrinks is None else batch.shrinks.tolist()
        for sequence, (context, prompt, dropped) in enumerate(zip(contexts, prompts, shrinks, strict=True)):
            rows = slice(starts[sequence], starts[sequence + 1])
            first = 0 if self.window is None else max(prompt - self.window, 0)
            grows = context <= prompt and self.shrink.count_dropped(prompt, size) > 0
            if dropped or ("mass" in self.planes and grows and context > first):
                yield _Chunk(sequence, rows, context, first, dropped)

    def _look(self, step: LayerStep, chunk: _Chunk) -> None:
        """Count the attention of a chunk; if blocks are dropped, its prompt ends here: keep some of it."""
        cache, context = step.cache, chunk.context
        size, begin = cache.keys.shape[3], context - (chunk.rows.stop - chunk.rows.start)
        blocks = step.batch.block_tables[cache.group][chunk.sequence, : -(-context // size)].long()
        keys, values = (each[:, :context] for each in read_blocks(cache, blocks))
        mass = keys.new_zeros(len(keys), len(blocks) * size)
        if cache.mass is not None and begin > chunk.first:
            mass[:, :begin] = join_heads(cache.mass[blocks])[:, :begin]
        first = max(begin, chunk.first)
        if first < context:
            queries = step.queries[chunk.rows][first - context :].float()
            self._add_attention(mass, queries, keys, step.spec)
        if cache.mass is not None:
            cache.mass[blocks] = split_blocks(mass, size)
        if chunk.dropped:
            kept = self.keep_tokens(Prompt(step.layer, keys, values, mass[:, :context]), context - chunk.dropped * size)
            write_kept(cache, blocks[chunk.dropped :], kept)

    def _add_attention(self, mass: Tensor, queries: Tensor, keys: Tensor, spec: AttentionSpec) -> None:
        """Add to mass [kv heads, C or more] what queries [T, heads, D], those of the last T of C tokens, give to tokens
        with keys [kv heads, C, D].

        Tiles begin at the same positions and have the same shapes whatever the chunks, and the sum goes query by query:
        so a prompt's mass has the same bits however it was cut.
        """
        heads, context, head_size = keys.shape
        first, padding = context - len(queries), -context % TILE
        queries = queries.reshape(len(queries), heads, -1, head_size).permute(1, 2, 0, 3)
        keys = functional.pad(keys, (0, 0, 0, padding))
        total = functional.pad(mass[:, :context], (0, padding))
        for begin in range(first // TILE * TILE, context, TILE):
            low, high, end = max(begin, first), min(begin + TILE, context), begin + TILE
            tile = functional.pad(queries[:, :, low - first : high - first], (0, 0, low - begin, end - high))
            seen = torch.arange(begin + 1, end + 1, device=keys.device)
            given = self.count_attention(weigh(tile, keys[:, :end], seen, spec), seen)
            for row in given[:, low - begin : high - begin].unbind(1):
                total[:, :end] += row
        mass[:, :context] = total[:, :context]


class Evicting(Shrinking):
    """A policy that keeps some tokens as they are, those of the highest scores."""

    def keep_tokens(self, prompt: Prompt, count: int) -> Kept:
        scores = self.score(prompt, count).expand(len(prompt.keys), -1)
        chosen = choose_highest(scores, count)[..., None].expand(-1, -1, prompt.keys.shape[2])
        return Kept(prompt.keys.gather(1, chosen), prompt.values.gather(1, chosen))

    @abstractmethod
    def score(self, prompt: Prompt, count: int) -> Tensor:
        """How much each token is worth to a kv head [kv heads or 1, S]: the `count` highest stay."""


def weigh(queries: Tensor, keys: Tensor, seen: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention weights [kv heads, h, Q, C] of queries [kv heads, h, Q, D] that see the first `seen` [Q] of the keys
    [kv heads, C, D]."""
    scores = torch.matmul(queries.flatten(1, 2), keys.transpose(1, 2)).view(*queries.shape[:3], -1) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    later = torch.arange(keys.shape[1], device=keys.device) >= seen[:, None]
    return torch.softmax(scores.masked_fill_(later, -torch.inf), -1)


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
        cache.bias[blocks] = split_blocks(functional.pad(kept.bias, rest[2:]), size)


def join_heads(plane: Tensor) -> Tensor:
    """Numbers of blocks [n, kv heads, block size] as [kv heads, tokens]."""
    return plane.transpose(0, 1).flatten(1)


def split_blocks(numbers: Tensor, size: int) -> Tensor:
    """Numbers [kv heads, tokens] as a plane has them, [n, kv heads, block size]."""
    return numbers.view(len(numbers), -1, size).transpose(0, 1)
