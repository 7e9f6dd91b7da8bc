"""KIVI (arXiv 2402.02750): keys rounded by channel, values by token, the newest tokens exact.

As in section 3 of the paper, with groups of 32. Here a block is sealed when it fills, and a query reads sealed what is
older than the residual, while a prompt is computed too; the paper computes prompts exactly. So what a query reads
depends on the tokens before it alone, not on chunks or on what the prefix tree had, and prefixes can be shared.
"""

from __future__ import annotations

from torch import Tensor

from headrace.cache.layout import CacheGroup, CacheLayout
from headrace.cache.policies.base import KVShape, LayerStep, Plane
from headrace.cache.policies.parameters import check_choice, check_number
from headrace.cache.policies.sealing import arrange_sealed, seal_filled
from headrace.kernels.base import SealedForm


class Kivi:
    """See `KVPolicy`. Layers with sliding windows stay exact."""

    planes: tuple[Plane, ...] = ()

    def __init__(self, k: int = 4, v: int = 4, residual: int = 32, first: int = 0) -> None:
        """k, v: bits of a key's and a value's element, 2, 4 or 8. residual: the least of the newest tokens that are
        read exactly; first: those of the oldest, in whole blocks."""
        check_choice("kivi", "k", k, (2, 4, 8))
        check_choice("kivi", "v", v, (2, 4, 8))
        check_number("kivi", "residual", residual, 1, 4096)
        check_number("kivi", "first", first, 0, 4096)
        self.form = SealedForm(k, v)
        self.residual = residual
        self.first = first

    def arrange(self, shape: KVShape, block_size: int) -> CacheLayout:
        head_bytes = self.form.count_head_bytes(shape.head_size, block_size)
        first = -(-self.first // block_size) * block_size
        exact = CacheGroup((), self.residual, shape.count_layer_bytes(block_size), first=first)
        return arrange_sealed(shape, block_size, shape.kv_heads * head_bytes, exact)

    def attend(self, step: LayerStep) -> Tensor:
        seal_filled(step)
        return step.kernels.attention(step.queries, step.cache, step.batch, step.spec)
