"""The memory of the KV cache: one key and one value tensor for each layer of a group. Knows nothing of sequences."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from headrace.cache.layout import CacheLayout


class PagedCache:
    """Keys and values of `num_blocks` blocks, shared by all groups of a layout.

    keys    [blocks, kv heads, head size / pair, block size, pair]: scores are computed for many keys at once
    values  [blocks, kv heads, block size / pair, head size, pair]: outputs are computed for many head elements at once

    where pair is 1 in float32 and 2 in bfloat16 (see `Kernels`).

    Zero-filled, on a CPU by the operating system as blocks are first touched: an unused budget costs no memory.
    """

    def __init__(
        self, layout: CacheLayout, num_blocks: int, kv_heads: int, head_size: int, dtype: torch.dtype, device: str
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        self.block_bytes = block_bytes(layout, kv_heads, head_size, dtype)
        pair = 4 // dtype.itemsize
        key_shape = (num_blocks, kv_heads, head_size // pair, layout.block_size, pair)
        value_shape = (num_blocks, kv_heads, layout.block_size // pair, head_size, pair)
        layers = range(layout.layers_per_group)
        self.keys = [make_zeros(key_shape, dtype, device) for _ in layers]
        self.values = [make_zeros(value_shape, dtype, device) for _ in layers]

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


def make_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Zeros of this shape. torch.zeros would write, and so take, all of the memory at once; these come as touched."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Memory of the C library's would be cleared, and so taken, where an earlier cache has given it back.
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
