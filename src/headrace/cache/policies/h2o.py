"""H2O (arXiv 2306.14048): heavy hitters, the tokens that got most attention from all queries, and recent ones stay."""

from __future__ import annotations

from torch import Tensor

from headrace.cache.policies.parameters import check_choice, check_number
from headrace.cache.policies.shrinking import Context, Evicting, protect


class H2O(Evicting):
    """Sums of attention over all of the prompt's queries, or all since the last time, and over the query heads of a kv
    head decide.

    The paper (section 4) keeps half of its budget for recent tokens, drops one token at each step, and its sums favour
    old tokens, which more queries have seen. Here what goes goes at the prompt's end, and with `every` once in so many
    tokens, by the attention since then; a sum is divided by the number of queries that have seen its token. With
    recent=0.5, divide=False a prompt's sums are the paper's. Costs a second pass over queries and keys.
    """

    def __init__(self, keep: float = 0.25, recent: float = 0.0, divide: bool = True, every: int = 0) -> None:
        """keep, every: see `Shrinking`. recent: this share of what stays is the newest tokens."""
        super().__init__("h2o", keep, every, None, ("mass",))
        check_number("h2o", "recent", recent, 0, 1, whole=False)
        if not isinstance(divide, bool):
            check_choice("h2o", "divide", divide, (True, False))
        self.recent = recent
        self.divide = divide

    def score(self, context: Context, count: int) -> Tensor:
        scores = context.mass
        if self.divide:
            scores = scores / context.queries
        return protect(scores, count, 0, int(self.recent * count))
