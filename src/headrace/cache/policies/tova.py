"""TOVA (arXiv 2401.06104): the tokens that the newest query attends to stay, the same ones in every head."""

from __future__ import annotations

from torch import Tensor

from headrace.cache.policies.shrinking import Evicting, Prompt, protect


class Tova(Evicting):
    """The weights of the prompt's last query, averaged over all heads of a layer, decide; the last token stays.

    The paper (section 3.2) drops one token at each step once a budget is full. Here all that goes goes at the prompt's
    end, by its last query, and what is generated is all kept.
    """

    def __init__(self, keep: float = 0.25) -> None:
        """keep: see `Shrinking`."""
        super().__init__("tova", keep, window=1)

    def score(self, prompt: Prompt, count: int) -> Tensor:
        return protect(prompt.mass.sum(0, keepdim=True), count, 0, 1)
