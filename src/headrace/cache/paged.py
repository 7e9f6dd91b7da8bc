"""The memory of the KV cache: one key and one value tensor for each layer of a group. Knows nothing of sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.cache.layout import CacheLayout


class PagedCache:
    """Keys and values of `num_blocks` blocks, shared by all groups of a layout.

    keys    [blocks, kv heads, head size, block size]: scores are computed for many keys at once
    values  [blocks, kv heads, block size, head size]: outputs are computed for many head elements at once

    Zero-filled: the operating system gives memory as blocks are first written, so an unused budget costs nothing.
    """

    def __init__(
        self, layout: CacheLayout, num_blocks: int, kv_heads: int, head_size: int, dtype: torch.dtype, device: str
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        self.block_bytes = block_bytes(layout, kv_heads, head_size, dtype)
        key_shape = (num_blocks, kv_heads, head_size, layout.block_size)
        value_shape = (num_blocks, kv_heads, layout.block_size, head_size)
        layers = range(layout.layers_per_group)
        self.keys = [torch.zeros(key_shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(value_shape, dtype=dtype, device=device) for _ in layers]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes over all layers."""
        return self.block_bytes * len(self.layout.groups) // self.layout.block_size

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The key and the value tensor in which this layer's blocks lie, beside those of other groups."""
        _, index = self.layout.place(layer)
        return self.keys[index], self.values[index]


def block_bytes(layout: CacheLayout, kv_heads: int, head_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: keys and values of block_size tokens in one group's layers."""
    return 2 * layout.layers_per_group * layout.block_size * kv_heads * head_size * dtype.itemsize
