"""SnapKV (arXiv 2404.14469): what the prompt's last queries attend to, and what is beside it, stays."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from headrace.cache.policies.parameters import check_choice, check_number
from headrace.cache.policies.shrinking import Context, Evicting, protect


class SnapKV(Evicting):
    """As in section 4 of the paper: attention of a window of last queries, summed over them and over the query heads of
    a kv head, smoothed over neighbouring tokens; the window itself stays. The paper does this to prompts; with `every`
    output is treated alike.
    """

    def __init__(self, keep: float = 0.25, window: int = 64, kernel: int = 5, every: int = 0) -> None:
        """keep, every: see `Shrinking`. window: so many last queries decide. kernel: tokens that a score is averaged
        over."""
        check_number("snapkv", "window", window, 1, 1024)
        check_choice("snapkv", "kernel", kernel, tuple(range(1, 64, 2)))
        super().__init__("snapkv", keep, every, window, ("mass",))
        self.recent = window
        self.kernel = kernel

    def score(self, context: Context, count: int) -> Tensor:
        # The window's own tokens stay anyway: they are no neighbours to the others.
        before, scores = context.length - self.recent, context.mass
        if before > 0:
            smooth = functional.avg_pool1d(scores[:, :before], self.kernel, 1, self.kernel // 2)
            scores = torch.cat([smooth, scores[:, before:]], 1)
        return protect(scores, count, 0, self.recent)
