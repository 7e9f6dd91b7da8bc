"""KVMerger (arXiv 2407.08454): neighbouring tokens with like keys become one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from headrace.cache.policies.base import Plane
from headrace.cache.policies.parameters import check_choice, check_number
from headrace.cache.policies.shrinking import Context, Kept, Shrinking, choose_highest
from headrace.core import InputError


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

    def keep_tokens(self, context: Context, count: int) -> Kept:
        alone = self._protect(context.mass, count)
        sets = join_alike(context.keys, alone, count)
        return merge(context, sets, count, self.sigma)

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


def merge(context: Context, sets: Tensor, count: int, sigma: float) -> Kept:
    """Each set's weighted mean of keys and of values, and the logarithm of its size: how many tokens it stands for."""
    pivots = find_pivots(context.mass, sets, count).gather(1, sets)
    center = context.keys.gather(1, pivots[..., None].expand_as(context.keys))
    sizes = torch.ones_like(context.mass) if context.bias is None else context.bias.exp()
    weights = torch.exp(-(context.keys - center).square().sum(-1) / (2 * sigma**2)) * sizes

    def add(numbers: Tensor) -> Tensor:
        index = sets if numbers.dim() == 2 else sets[..., None].expand_as(numbers)
        return numbers.new_zeros(len(sets), count, *numbers.shape[2:]).scatter_add_(1, index, numbers)

    weights = (weights / add(weights).gather(1, sets))[..., None]
    return Kept(add(weights * context.keys), add(weights * context.values), add(sizes).log())


def find_pivots(mass: Tensor, sets: Tensor, count: int) -> Tensor:
    """The token of each set [kv heads, count] with the most mass [kv heads, S], the first of equals."""
    best = mass.new_zeros(len(sets), count).scatter_reduce_(1, sets, mass, "amax", include_self=False)
    places = torch.arange(mass.shape[1], device=mass.device).expand_as(sets)
    places = places.masked_fill(mass < best.gather(1, sets), mass.shape[1])
    return sets.new_full((len(sets), count), mass.shape[1]).scatter_reduce_(1, sets, places, "amin")
