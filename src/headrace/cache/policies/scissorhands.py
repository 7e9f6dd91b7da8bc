"""Scissorhands (arXiv 2305.17118): tokens that were attended to little, step after step, go."""

from __future__ import annotations

from torch import Tensor

from headrace.cache.policies.parameters import check_number
from headrace.cache.policies.shrinking import Context, Evicting, protect


class Scissorhands(Evicting):
    """Over a history of queries it is counted how often a token's weight was below the average, one over the number of
    tokens seen (algorithm 2 of the paper); the tokens with the most such steps go, the newest stay.

    The paper does this whenever a fixed budget B is full, and drops half: with keep=B/2, every=B/2 no more than B
    tokens and a block are ever held of a sequence whose prompt is complete. The budget is the same in every layer. Most
    counts are equal: of equals, those that got the most attention stay. Steps before a token was there count as below
    the average, and history does not reach back behind the last time. Counts and attention are summed over the query
    heads of a kv head.
    """

    def __init__(self, keep: float = 0.25, history: int = 400, recent: int = 10, every: int = 0) -> None:
        """keep, every: see `Shrinking`. history: so many last queries are looked at. recent: so many last tokens
        stay."""
        check_number("scissorhands", "history", history, 1, 4096)
        check_number("scissorhands", "recent", recent, 0, 4096)
        super().__init__("scissorhands", keep, every, history, ("mass",))
        self.history = history
        self.recent = recent

    def find_share(self, heads: int) -> float:
        """So small that no sum of weights makes one."""
        return 1 / (1 + self.history * heads)

    def score(self, context: Context, count: int) -> Tensor:
        return protect(context.mass, count, 0, self.recent)
