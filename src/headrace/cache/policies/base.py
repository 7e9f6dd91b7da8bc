"""What a KV policy is: how keys and values are kept once they are computed, and how queries read them.

The engine, the schedule and the prefix tree know no policy by name: they see a layout, which says all that bookkeeping
needs to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from headrace.cache.layout import CacheLayout
from headrace.kernels.base import AttentionSpec, Kernels, LayerCache, RaggedBatch, SealedForm

# See LayerCache: both are float32 [blocks, kv heads, block size].
Plane = Literal["bias", "mass"]


@dataclass(frozen=True, slots=True)
class KVShape:
    """What of a model decides how large its keys and values are. windows: by layer, None where it sees all tokens;
    soft_cap: of scores, as in `AttentionSpec`.

    measure_keys gives the L2 norms of the key weights' rows, float32 [layers, kv heads, D]; None before any weight is
    read.
    """

    windows: tuple[int | None, ...]
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    measure_keys: Callable[[], Tensor] | None = field(default=None, compare=False)
    soft_cap: float | None = None

    def count_layer_bytes(self, block_size: int, planes: int = 0) -> int:
        """Bytes of one layer's exact keys and values in one block, and of so many planes."""
        return block_size * self.kv_heads * (2 * self.head_size * self.dtype.itemsize + 4 * planes)


@dataclass(frozen=True, slots=True)
class LayerStep:
    """One layer's share of a step, its keys and values just written exactly.

    queries [T, heads, D], any stride between tokens; cache is this layer's, caches are all layers'.
    rope: cos and sin by which the layer rotates a query or key at each position, float32 [context, D / 2] each.
    """

    layer: int
    queries: Tensor
    cache: LayerCache
    batch: RaggedBatch
    spec: AttentionSpec
    kernels: Kernels
    caches: Sequence[LayerCache] = ()
    rope: tuple[Tensor, Tensor] | None = None


class KVPolicy(Protocol):
    """How keys and values are kept. Made once for an engine, used by its thread alone.

    Whatever a policy keeps of a sequence from step to step in memory is in the blocks that the sequence holds by the
    layout: so the KV budget, admission, forecasts and the judge count it. Beside them there may be files, no more.

    form             how sealed blocks lie in memory; None if nothing is sealed, or only the policy can read it
    residual         a query at position p reads the block of token p - residual + 1 and later ones exactly
    planes           numbers that exact blocks hold for each token and kv head beside its key and value, and those that
                     are sealed in a form a bias
    """

    @property
    def form(self) -> SealedForm | None: ...

    @property
    def residual(self) -> int: ...

    @property
    def planes(self) -> tuple[Plane, ...]: ...

    def arrange(self, shape: KVShape, block_size: int) -> CacheLayout:
        """Groups for a model's layers, whether blocks may be shared, and how much of a sequence stays.

        Raises InputError, saying why, for a model or block size it cannot serve.
        """
        ...

    def attend(self, step: LayerStep) -> Tensor:
        """Attention [T, heads, D] of the step's queries. Brings what this step has filled into the policy's form first,
        so that a query reads the same whatever chunk or batch it comes in."""
        ...


@runtime_checkable
class Sealable(Protocol):
    """A policy that can be combined with rounding, as in `minicache(start=26)+kivi(k=4, v=4)`."""

    def with_sealing(self, form: SealedForm, residual: int) -> KVPolicy:
        """A policy like this one that also rounds what it keeps to the form's bits, with at least this residual."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """A policy that knows sequences by their numbers: where it has kept something of them, or a file."""

    def release(self, number: int) -> None:
        """The sequence has no blocks any more: it has ended, or will be computed anew."""
        ...

    def count_bytes(self) -> int:
        """Bytes of the files that it has now beside the arena."""
        ...
