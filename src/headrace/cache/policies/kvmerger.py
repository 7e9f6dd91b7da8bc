"""KVMerger (arXiv 2407.08454): neighbouring tokens with like keys become one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from headrace.cache.layout import CacheLayout
from headrace.cache.policies.base import KVShape, LayerStep, Plane
from headrace.cache.policies.parameters import check_choice, check_number
from headrace.cache.policies.shrinking import Context, Shrinking, choose_highest, join_heads
from headrace.core import InputError
from headrace.kernels.contexts import read_blocks, write_slots


class Tokens(NamedTuple):
    """Keys and values of tokens, float32 [kv heads, S, D], and how many tokens each stands for [kv heads, S]."""

    keys: Tensor
    values: Tensor
    sizes: Tensor


class KVMerger(Shrinking):
    """Sets of consecutive tokens whose keys are like their neighbours' become one key and value each, by weights of a
    Gaussian around the key of the token that got the most attention (sections 4.2 and 4.3 of the paper). The newest
    tokens and the heavy hitters stay as they are.

    The paper joins neighbours above a threshold that is chosen to meet a budget; here the most similar pairs are joined
    until the budget is met, which is the same. The paper leaves the first two layers and the last as they are; here
    all layers keep equally many tokens, as all their blocks are dropped at once. Its bias is ours: the logarithm of a
    set's size is added to its scores, so that a set weighs as much as its tokens did, also when sets are merged again.
    """

    def __init__(
        self,
        keep: float = 0.5,
        sigma: float = 5.0,
        recent: float = 0.34,
        heavy: float = 0.24,
        bias: bool = True,
        every: int = 0,
    ) -> None:
        """keep, every: see `Shrinking`. sigma: the Gaussian's width, as keys are long. recent, heavy: shares of what
        stays."""
        planes: tuple[Plane, ...] = ("bias", "mass") if bias else ("mass",)
        super().__init__("kvmerger", keep, every, None, planes)
        check_number("kvmerger", "sigma", sigma, 0.01, 1e6, whole=False)
        check_number("kvmerger", "recent", recent, 0, 1, whole=False)
        check_number("kvmerger", "heavy", heavy, 0, 1, whole=False)
        if not isinstance(bias, bool):
            check_choice("kvmerger", "bias", bias, (True, False))
        if recent + 2 * heavy > 0.9:
            raise InputError(f"kv kvmerger: recent {recent:g} and heavy {heavy:g} leave no neighbours to merge")
        self.sigma = sigma
        self.recent = recent
        self.heavy = heavy

    def arrange(self, shape: KVShape, block_size: int) -> CacheLayout:
        if "bias" in self.planes and shape.soft_cap is not None:
            raise InputError(
                "this model caps attention scores (attn_logit_softcapping): what kv kvmerger adds to the scores of "
                "merged tokens would be capped with them and count for less; use another kv"
            )
        return super().arrange(shape, block_size)

    def keep_tokens(self, step: LayerStep, context: Context, blocks: Tensor, dropped: int) -> None:
        cache, size = step.cache, step.cache.keys.shape[3]
        count = context.length - dropped * size
        keys, values = (each[:, : context.length] for each in read_blocks(cache, blocks))
        sizes = torch.ones_like(context.mass)
        if cache.bias is not None:
            sizes = join_heads(cache.bias[blocks])[:, : context.length].exp()
        keys, values, sizes = self.merge_tokens(Tokens(keys, values, sizes), context.mass, count)
        write_slots(cache, blocks, dropped * size, keys, values)
        if cache.bias is not None:
            bias = functional.pad(sizes.log(), (0, -count % size))
            cache.bias[blocks[dropped:]] = bias.view(len(bias), -1, size).transpose(0, 1)

    def merge_tokens(self, tokens: Tokens, mass: Tensor, count: int) -> Tokens:
        """So many sets of these tokens with this mass [kv heads, S]: each one's weighted mean of keys and of values,
        and the sum of its sizes."""
        sets = join_alike(tokens.keys, self._protect(mass, count), count)
        center = find_pivots(mass, sets, count).gather(1, sets)[..., None].expand_as(tokens.keys)
        gaps = (tokens.keys - tokens.keys.gather(1, center)).square().sum(-1)
        weights = torch.exp(-gaps / (2 * self.sigma**2)) * tokens.sizes
        weights = (weights / add_sets(weights, sets, count).gather(1, sets))[..., None]
        return Tokens(
            *(add_sets(each, sets, count) for each in (weights * tokens.keys, weights * tokens.values, tokens.sizes))
        )

    def _protect(self, mass: Tensor, count: int) -> Tensor:
        """The tokens that stay as they are, bool like mass [kv heads, S]."""
        recent = mass.shape[1] - int(self.recent * count)
        heavy = choose_highest(mass[:, :recent], int(self.heavy * count))
        alone = torch.zeros_like(mass, dtype=torch.bool).scatter_(1, heavy, True)
        alone[:, recent:] = True
        return alone


def join_alike(keys: Tensor, alone: Tensor, count: int) -> Tensor:
    """The set of each token, int64 [kv heads, S] ascending from 0 to count - 1: neighbours are joined, those with the
    most similar keys first, but for tokens that stay alone [kv heads, S], unless nothing else is left."""
    alike = functional.cosine_similarity(keys[:, :-1], keys[:, 1:], dim=-1)
    alike = alike.masked_fill(alone[:, :-1] | alone[:, 1:], -torch.inf)
    later = choose_highest(alike, keys.shape[1] - count) + 1
    return torch.ones_like(alone, dtype=torch.int64).scatter_(1, later, 0).cumsum(1) - 1


def add_sets(numbers: Tensor, sets: Tensor, count: int) -> Tensor:
    """Sums over each of `count` sets of numbers [kv heads, S, ...]."""
    index = sets if numbers.dim() == 2 else sets[..., None].expand_as(numbers)
    return numbers.new_zeros(len(sets), count, *numbers.shape[2:]).scatter_add_(1, index, numbers)


def find_pivots(mass: Tensor, sets: Tensor, count: int) -> Tensor:
    """The token of each set [kv heads, count] with the most mass [kv heads, S], the first of equals."""
    best = mass.new_zeros(len(sets), count).scatter_reduce_(1, sets, mass, "amax", include_self=False)
    places = torch.arange(mass.shape[1], device=mass.device).expand_as(sets)
    places = places.masked_fill(mass < best.gather(1, sets), mass.shape[1])
    return sets.new_full((len(sets), count), mass.shape[1]).scatter_reduce_(1, sets, places, "amin")
