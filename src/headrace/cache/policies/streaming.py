"""Policies that look at nothing but positions: StreamingLLM (arXiv 2309.17453), and random tokens to compare with."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from headrace.cache.policies.parameters import check_number
from headrace.cache.policies.shrinking import Context, Evicting, protect


class Streaming(Evicting):
    """Attention sinks, the first tokens, and the newest ones stay (section 3).

    The paper numbers positions anew inside the cache, as its texts never end; here positions stay true, as in all
    policies of this kind. The paper's cache, of a fixed size, is a whole number for keep, and `every` a block.
    """

    def __init__(self, keep: float = 0.25, sinks: int = 4, every: int = 0) -> None:
        """keep, every: see `Shrinking`. sinks: so many first tokens stay."""
        super().__init__("streaming", keep, every)
        check_number("streaming", "sinks", sinks, 0, 4096)
        self.sinks = sinks

    def score(self, context: Context, count: int) -> Tensor:
        places = torch.arange(context.length, dtype=torch.float32, device=context.mass.device)
        return protect(places[None], count, self.sinks, 0)


class RandomTokens(Evicting):
    """The control of all that choose: the first tokens stay and of the others any, by chance, each head its own.

    The chance is of the seed, the layer and the lengths alone: the same row loses the same in any company.
    """

    def __init__(self, keep: float = 0.25, sinks: int = 4, seed: int = 0, every: int = 0) -> None:
        """keep, every: see `Shrinking`. sinks: so many first tokens stay."""
        super().__init__("random", keep, every)
        check_number("random", "sinks", sinks, 0, 4096)
        check_number("random", "seed", seed, 0, 2**31)
        self.sinks = sinks
        self.seed = seed

    def score(self, context: Context, count: int) -> Tensor:
        # torch uses 32 bits of a seed: these are made of all three numbers.
        mixed = random.Random(f"{self.seed} {context.layer} {context.end}").getrandbits(32)
        chance = torch.Generator().manual_seed(mixed)
        scores = torch.rand(context.mass.shape, generator=chance).to(context.mass.device)
        return protect(scores, count, self.sinks, 0)
