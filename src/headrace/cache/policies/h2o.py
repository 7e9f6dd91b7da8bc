"""H2O (arXiv 2306.14048): heavy hitters, the tokens that got most attention from all queries, and recent ones stay."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.cache.policies.parameters import check_choice, check_number
from headrace.cache.policies.shrinking import Evicting, Prompt, protect


class H2O(Evicting):
    """Sums of attention over all of the prompt's queries and over the query heads of a kv head decide.

    The paper (section 4) keeps half of its budget for recent tokens, drops one token at each step, and its sums favour
    old tokens, which more queries have seen. Here all that goes goes at the prompt's end, and a sum is divided by the
    number of queries that have seen its token. With recent=0.5, divide=False the sums are the paper's. Costs a second
    pass over queries and keys.
    """

    def __init__(self, keep: float = 0.25, recent: float = 0.0, divide: bool = True) -> None:
        """keep: see `Shrinking`. recent: this share of what stays is the newest tokens."""
        super().__init__("h2o", keep, None, ("mass",))
        check_number("h2o", "recent", recent, 0, 1, whole=False)
        if not isinstance(divide, bool):
            check_choice("h2o", "divide", divide, (True, False))
        self.recent = recent
        self.divide = divide

    def score(self, prompt: Prompt, count: int) -> Tensor:
        scores = prompt.mass
        if self.divide:
            scores = scores / torch.arange(prompt.length, 0, -1, device=scores.device)
        return protect(scores, count, 0, int(self.recent * count))
