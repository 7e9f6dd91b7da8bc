"""The plain cache: every key and value as it was computed."""

from __future__ import annotations

from torch import Tensor

from headrace.cache.layout import CacheLayout
from headrace.cache.policies.base import KVShape, LayerStep, Plane
from headrace.kernels.base import SealedForm


class Plain:
    """See `KVPolicy`."""

    form: SealedForm | None = None
    residual = 1
    planes: tuple[Plane, ...] = ()

    def arrange(self, shape: KVShape, block_size: int) -> CacheLayout:
        return CacheLayout.from_windows(shape.windows, block_size, shape.count_layer_bytes(block_size))

    def attend(self, step: LayerStep) -> Tensor:
        return step.kernels.attention(step.queries, step.cache, step.batch, step.spec)
