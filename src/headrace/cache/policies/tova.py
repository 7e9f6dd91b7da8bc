"""TOVA (arXiv 2401.06104): the tokens that the newest query attends to stay, the same ones in every head."""

from __future__ import annotations

from torch import Tensor

from headrace.cache.policies.shrinking import Context, Evicting, protect


class Tova(Evicting):
    """The weights of the last query, averaged over all heads of a layer, decide; the last token stays.

    The paper (section 3.2) drops one token at each step once a budget is full. Here what goes goes at the prompt's end,
    and with `every` once in so many tokens.
    """

    def __init__(self, keep: float = 0.25, every: int = 0) -> None:
        """keep, every: see `Shrinking`."""
        super().__init__("tova", keep, every, 1, ("mass",))

    def score(self, context: Context, count: int) -> Tensor:
        return protect(context.mass.sum(0, keepdim=True), count, 0, 1)
