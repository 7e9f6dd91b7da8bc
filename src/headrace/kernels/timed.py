"""Kernels that tell a stopwatch how long they take. The arithmetic is another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from headrace.kernels.base import AttentionSpec, HeadSpec, Kernels, LayerCache, RaggedBatch
from headrace.kernels.matrix import Matrix, PackedWeight
from headrace.kernels.shadows import ShadowRows
from headrace.kernels.vectors import VectorForm
from headrace.meter.meter import product_part
from headrace.meter.stopwatch import Stopwatch


class TimedKernels:
    """See `Kernels`. Parts of the stopwatch: products by their shape, attention, other kernels."""

    def __init__(self, kernels: Kernels, watch: Stopwatch) -> None:
        self.kernels = kernels
        self.watch = watch
        self.name = kernels.name
        self.instruction_set = kernels.instruction_set

    def set_threads(self, threads: int) -> None:
        self.kernels.set_threads(threads)

    def pack(self, matrix: Matrix) -> PackedWeight:
        return self.kernels.pack(matrix)

    def expect(self, weights: Sequence[PackedWeight]) -> None:
        self.kernels.expect(weights)

    def unload(self, weight: PackedWeight) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        return self.kernels.unload(weight)

    def reload(self, parts: Mapping[str, Tensor], numbers: tuple[int, ...]) -> PackedWeight:
        return self.kernels.reload(parts, numbers)

    def linear(self, x: Tensor, weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        with self.watch.part(product_part(x.shape[1], weight.out_features)):
            return self.kernels.linear(x, weight, dtype)

    def find_largest(self, x: Tensor, weight: PackedWeight) -> Tensor:
        with self.watch.part(product_part(x.shape[1], weight.out_features)):
            return self.kernels.find_largest(x, weight)

    def norm_linear(self, x: Tensor | None, residual: Tensor, norm: Tensor, eps: float, weight: PackedWeight) -> Tensor:
        with self.watch.part(product_part(residual.shape[1], weight.out_features)):
            return self.kernels.norm_linear(x, residual, norm, eps, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        with self.watch.part("other kernels"):
            return self.kernels.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        with self.watch.part("other kernels"):
            return self.kernels.add_rms_norm(x, residual, weight, eps)

    def place_heads(
        self,
        fused: Tensor,
        spec: HeadSpec,
        rotation: tuple[Tensor, Tensor],
        cache: LayerCache,
        slots: Tensor,
    ) -> None:
        with self.watch.part("other kernels"):
            self.kernels.place_heads(fused, spec, rotation, cache, slots)

    def seal(self, cache: LayerCache, exact: Tensor, sealed: Tensor) -> None:
        with self.watch.part("other kernels"):
            self.kernels.seal(cache, exact, sealed)

    def move_tokens(self, cache: LayerCache, blocks: Tensor, slots: Tensor, into: int) -> None:
        with self.watch.part("other kernels"):
            self.kernels.move_tokens(cache, blocks, slots, into)

    def unpack(
        self,
        form: VectorForm,
        plane: Tensor,
        blocks: Tensor,
        into: Tensor,
        factors: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        with self.watch.part("other kernels"):
            self.kernels.unpack(form, plane, blocks, into, factors, order)

    def observe(
        self, queries: Tensor, cache: LayerCache, batch: RaggedBatch, spec: AttentionSpec, share: float = 0.0
    ) -> None:
        with self.watch.part("other kernels"):
            self.kernels.observe(queries, cache, batch, spec, share)

    def recall(
        self,
        queries: Tensor,
        cache: LayerCache,
        shadow: ShadowRows,
        into: Tensor,
        rope: tuple[Tensor, Tensor],
        scale: float,
    ) -> None:
        with self.watch.part("attention"):
            self.kernels.recall(queries, cache, shadow, into, rope, scale)

    def attention(self, queries: Tensor, cache: LayerCache, batch: RaggedBatch, spec: AttentionSpec) -> Tensor:
        with self.watch.part("attention"):
            return self.kernels.attention(queries, cache, batch, spec)
