"""Scissorhands (arXiv 2305.17118): tokens that were attended to little, step after step, go."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.cache.policies.parameters import check_number
from headrace.cache.policies.shrinking import Evicting, Prompt, protect


class Scissorhands(Evicting):
    """Over a history of queries it is counted how often a token's weight was below the average, one over the number of
    tokens seen (algorithm 2 of the paper); the tokens with the most such steps go, the newest stay.

    The paper does this again and again while it generates, each time half of a fixed budget. Here it is done once, at
    the prompt's end, with the prompt's last queries as history and down to the whole budget, the same in every layer;
    what is generated is all kept. Most counts are equal: of equals, those that got the most attention stay. Steps
    before a token was there count as below the average. Counts and attention are summed over the query heads of a kv
    head.
    """

    def __init__(self, keep: float = 0.25, history: int = 400, recent: int = 10) -> None:
        """keep: see `Shrinking`. history: so many last queries are looked at. recent: so many last tokens stay."""
        check_number("scissorhands", "history", history, 1, 4096)
        check_number("scissorhands", "recent", recent, 0, 4096)
        super().__init__("scissorhands", keep, history, ("mass",))
        self.history = history
        self.recent = recent

    def count_attention(self, weights: Tensor, seen: Tensor) -> Tensor:
        """One for each weight that is not low, and the weights themselves, so small that no sum of them makes one."""
        share = 1 / (1 + self.history * weights.shape[1])
        return torch.where(weights * seen[:, None] < 1, weights * share, 1 + weights * share).sum(1)

    def score(self, prompt: Prompt, count: int) -> Tensor:
        return protect(prompt.mass, count, 0, self.recent)
