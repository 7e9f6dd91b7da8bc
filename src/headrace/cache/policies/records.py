"""Sealed blocks in a policy's own form: numbers of several kinds, one after the other as bytes.

Knows bytes, not what they mean, which blocks are sealed, when, or for whom.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.kernels.vectors import Part

# A record is so many bytes, or a multiple: then whatever lies after it in a block is aligned for any number.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Record:
    """What lies in one block, in this order."""

    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return -(-sum(part.nbytes for part in self.parts) // ALIGNMENT) * ALIGNMENT

    def write(self, plane: Tensor, blocks: Tensor, numbers: list[Tensor]) -> None:
        """Put numbers [n, *shape], one tensor a part, into blocks [n] of a plane uint8 [blocks, at least nbytes]."""
        flat = [each.to(part.dtype).reshape(len(blocks), -1) for part, each in zip(self.parts, numbers, strict=True)]
        whole = torch.cat([each.contiguous().view(torch.uint8) for each in flat], 1)
        plane[blocks.long(), : whole.shape[1]] = whole

    def read(self, plane: Tensor, blocks: Tensor, place: int) -> Tensor:
        """What `write` put there of the part at this place."""
        part = self.parts[place]
        start = sum(each.nbytes for each in self.parts[:place])
        numbers = torch.empty(len(blocks), *part.shape, dtype=part.dtype, device=plane.device)
        numbers.flatten(1).view(torch.uint8).copy_(plane[blocks.long(), start : start + part.nbytes])
        return numbers
