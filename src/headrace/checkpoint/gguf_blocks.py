"""Quantised tensors of GGUF files: dequantised by the gguf library, or as the 4-bit blocks that they are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from headrace.checkpoint.base import Blocks
from headrace.checkpoint.gguf_header import TensorEntry

# The gguf library works on 16 rows at a time; longer rows keep it out of Python, and these still fit the cache.
ROW_BYTES = 4096
# Packed bytes unpacked at a time: so few that the library's temporary arrays stay in the cache and are reused (twice as
# fast as a whole matrix at once).
PIECE_BYTES = 1 << 16
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def unpack_blocks(data: Bytes, entry: TensorEntry) -> torch.Tensor:
    """A quantised tensor's packed bytes to float32, by the gguf library."""
    row_bytes = entry.nbytes // math.prod(entry.shape[:-1])
    rows = entry.nbytes // row_bytes
    joined = next(count for count in range(max(1, min(rows, ROW_BYTES // row_bytes)), 0, -1) if rows % count == 0)
    packed = data.reshape(-1, joined * row_bytes)
    unpacked = np.empty((len(packed), joined * entry.shape[-1]), np.float32)
    step = max(1, PIECE_BYTES // (joined * row_bytes))
    for start in range(0, len(packed), step):
        unpacked[start : start + step] = dequantize(packed[start : start + step], entry.type)
    return torch.from_numpy(unpacked.reshape(entry.shape))


def split_blocks(data: Bytes, entry: TensorEntry) -> Blocks | None:
    """The blocks of a matrix in Q4_0 or Q4_1; None for other types.

    A block is of 32 inputs: its scale, in Q4_1 its minimum, both float16, then 16 bytes that hold input i in the lower
    and input 16 + i in the upper half. In Q4_0 a weight is (value - 8) * scale: the minimum is exactly -8 * scale.
    """
    if entry.type not in (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1) or len(entry.shape) != 2:
        return None
    size, size_bytes = GGML_QUANT_SIZES[entry.type]
    rows, columns = entry.shape
    blocks = torch.from_numpy(data.reshape(rows, columns // size, size_bytes).copy())
    packed = blocks[..., -size // 2 :]
    values = torch.cat([packed & 15, packed >> 4], dim=-1).view(rows, columns)
    numbers = blocks[..., : -size // 2].contiguous().view(torch.float16)
    scales = numbers[..., 0]
    return Blocks(values, scales, numbers[..., 1] if numbers.shape[-1] == 2 else scales * -8)
