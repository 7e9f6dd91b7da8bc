"""The memory of the KV cache: one arena of equal blocks, seen layer by layer. Knows nothing of sequences."""

from __future__ import annotations

import mmap
from dataclasses import replace

import torch
from torch import Tensor

from headrace.cache.layout import Place
from headrace.cache.policies.base import KVPolicy, KVShape
from headrace.cache.tier import Tier
from headrace.core import InputError
from headrace.kernels.base import LayerCache


class PagedCache:
    """`num_blocks` blocks, shared by all groups of a layout; what is in a block is as the policy's layout has it.

    Of an exact group a block has, layer by layer, keys and then values:
    keys    [kv heads, head size / pair, block size, pair]: scores are computed for many keys at once
    values  [kv heads, block size / pair, head size, pair]: outputs are computed for many head elements at once
    planes  the policy's, float32 [kv heads, block size] each
    extra   what a layer's bytes of a block have left, for the policy to use as it likes

    where pair is 1 in float32 and 2 in bfloat16 (see `Kernels`). Of a sealed group it has, layer by layer, what the
    policy's form says and what is left as above, or where it has no form, bytes that the policy alone can read.

    Below it there may be a `tier`, which keeps copies of full blocks on disk.

    Zero-filled, on a CPU by the operating system as blocks are first touched: an unused budget costs no memory.
    """

    def __init__(self, shape: KVShape, policy: KVPolicy, block_size: int, num_blocks: int, device: str) -> None:
        self.layout = policy.arrange(shape, block_size)
        self.num_blocks = num_blocks
        self.policy = policy
        self.device = device
        self.arena = make_zeros(num_blocks, self.layout.block_bytes, device)
        self.tier: Tier | None = None
        self.layers = [self._view(layer, shape) for layer in range(len(shape.windows))]

    def _view(self, layer: int, shape: KVShape) -> LayerCache:
        exact, sealed = self._view_exact(self.layout.place(layer), shape), self.layout.place_sealed(layer)
        return exact if sealed is None else self._view_sealed(exact, sealed, shape)

    def _view_exact(self, place: Place, shape: KVShape) -> LayerCache:
        size, heads, head_size = self.layout.block_size, shape.kv_heads, shape.head_size
        pair, half = 4 // shape.dtype.itemsize, size * heads * head_size * shape.dtype.itemsize
        layer_bytes = self.layout.groups[place.group].layer_bytes
        start = place.layer * layer_bytes
        keys, values = (self._part(start + each * half, half).view(shape.dtype) for each in range(2))
        cache = LayerCache(
            keys.view(-1, heads, head_size // pair, size, pair),
            values.view(-1, heads, size // pair, head_size, pair),
            place.group,
        )
        used = 2 * half
        for name in self.policy.planes:
            plane = self._plane(start + used, heads)
            cache = replace(cache, bias=plane) if name == "bias" else replace(cache, mass=plane)
            used += plane[0].nbytes
        return replace(cache, extra=self._rest(start + used, layer_bytes - used))

    def _view_sealed(self, exact: LayerCache, place: Place, shape: KVShape) -> LayerCache:
        """A layer's exact blocks with its sealed ones."""
        form, layer_bytes = self.policy.form, self.layout.groups[place.group].layer_bytes
        start, heads, used, bias = place.layer * layer_bytes, 1, layer_bytes, None
        if form is not None:
            heads = shape.kv_heads
            used = heads * form.count_head_bytes(shape.head_size, self.layout.block_size)
        sealed = self._part(start, used).view(-1, heads, used // heads)
        if form is not None and "bias" in self.policy.planes:
            bias = self._plane(start + used, heads)
            used += bias[0].nbytes
        return replace(
            exact,
            extra=self._rest(start + used, layer_bytes - used) if exact.extra is None else exact.extra,
            sealed=sealed,
            sealed_bias=bias,
            form=form,
            sealed_group=place.group,
            residual=self.policy.residual,
            first=self.layout.groups[exact.group].first,
        )

    def _plane(self, start: int, heads: int) -> Tensor:
        """Numbers of every block, float32 [blocks, kv heads, block size]."""
        size = self.layout.block_size
        return self._part(start, 4 * heads * size).view(torch.float32).view(-1, heads, size)

    def _rest(self, start: int, length: int) -> Tensor | None:
        """What is left of a layer's bytes, None if nothing is."""
        return self._part(start, length) if length else None

    def _part(self, start: int, length: int) -> Tensor:
        """Bytes of every block, uint8 [blocks, length]."""
        return self.arena[:, start : start + length]


def make_zeros(num_blocks: int, block_bytes: int, device: str) -> Tensor:
    """uint8 zeros. torch.zeros would write, and so take, all of the memory at once; these come as touched.

    Raises InputError for more than the system would ever give.
    """
    if device != "cpu":
        return torch.zeros(num_blocks, block_bytes, dtype=torch.uint8, device=device)
    # Memory of the C library's would be cleared, and so taken, where an earlier cache has given it back.
    size = num_blocks * block_bytes
    try:
        memory = mmap.mmap(-1, size)
    except (OSError, OverflowError) as error:
        raise InputError(f"the system has no {size:,} bytes for the KV cache: lower kv_cache_bytes") from error
    return torch.frombuffer(memory, dtype=torch.uint8).view(num_blocks, block_bytes)
