"""Policies that look at nothing but positions: StreamingLLM (arXiv 2309.17453), and random tokens to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.cache.policies.parameters import check_number
from headrace.cache.policies.shrinking import Evicting, Prompt, protect


class Streaming(Evicting):
    """Attention sinks, the first tokens, and the newest ones stay (section 3).

    The paper numbers positions anew inside the cache, as its texts never end; here positions stay true, as in all
    policies of this kind. What is generated is all kept.
    """

    def __init__(self, keep: float = 0.25, sinks: int = 4) -> None:
        """keep: see `Shrinking`. sinks: so many first tokens stay."""
        super().__init__("streaming", keep)
        check_number("streaming", "sinks", sinks, 0, 4096)
        self.sinks = sinks

    def score(self, prompt: Prompt, count: int) -> Tensor:
        places = torch.arange(prompt.length, dtype=torch.float32, device=prompt.keys.device)
        return protect(places[None], count, self.sinks, 0)


class RandomTokens(Evicting):
    """The control of all that choose: the first tokens stay and of the others any, by chance, each head its own.

    The chance is of the seed, the layer and the prompt's length alone: the same row loses the same in any company.
    """

    def __init__(self, keep: float = 0.25, sinks: int = 4, seed: int = 0) -> None:
        """keep: see `Shrinking`. sinks: so many first tokens stay."""
        super().__init__("random", keep)
        check_number("random", "sinks", sinks, 0, 4096)
        check_number("random", "seed", seed, 0, 2**31)
        self.sinks = sinks
        self.seed = seed

    def score(self, prompt: Prompt, count: int) -> Tensor:
        chance = torch.Generator().manual_seed((self.seed << 16) + prompt.layer)
        scores = torch.rand(len(prompt.keys), prompt.length, generator=chance).to(prompt.keys.device)
        return protect(scores, count, self.sinks, 0)
