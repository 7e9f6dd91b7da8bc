"""Sealed blocks in a policy's own form: numbers of several kinds, one after the other as bytes.

Knows how tokens become such numbers and back, not which blocks are sealed, when, or for whom.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from headrace.kernels.base import UNIT
from headrace.kernels.units import round_groups

# A record is so many bytes, or a multiple: then whatever lies after it in a block is aligned for any number.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Part:
    """Numbers of one kind in each block."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


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

    def read(self, plane: Tensor, blocks: Tensor) -> list[Tensor]:
        """What `write` put there."""
        lengths = [part.nbytes for part in self.parts]
        pieces = torch.split(plane[blocks.long(), : sum(lengths)], lengths, 1)
        found = []
        for part, piece in zip(self.parts, pieces, strict=True):
            numbers = torch.empty(len(blocks), *part.shape, dtype=part.dtype, device=plane.device)
            numbers.flatten(1).view(torch.uint8).copy_(piece)
            found.append(numbers)
        return found


class Codec(Protocol):
    """How the vectors of a block's tokens, float32 [n, tokens, width], become numbers."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """What there is of a block."""
        ...

    def encode(self, x: Tensor) -> list[Tensor]:
        """A tensor [n, ...] for each part."""
        ...

    def decode(self, numbers: list[Tensor]) -> Tensor:
        """The vectors again, float32."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """Every element as a number of this dtype."""

    tokens: int
    width: int
    dtype: torch.dtype

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part(self.dtype, (self.tokens, self.width)),)

    def encode(self, x: Tensor) -> list[Tensor]:
        return [x.to(self.dtype)]

    def decode(self, numbers: list[Tensor]) -> Tensor:
        return numbers[0].float()


@dataclass(frozen=True, slots=True)
class ByToken:
    """Codes of 2, 4 or 8 bits; 32 neighbouring elements of a token share a scale and a minimum (KIVI's values)."""

    tokens: int
    width: int
    bits: int

    @property
    def parts(self) -> tuple[Part, ...]:
        groups = Part(torch.float16, (self.tokens, self.width // UNIT))
        return Part(torch.uint8, (self.tokens, self.width * self.bits // 8)), groups, groups

    def encode(self, x: Tensor) -> list[Tensor]:
        codes, scales, minimums = round_groups(split_last(x, UNIT), self.bits)
        return [pack_codes(codes.flatten(2), self.bits), scales, minimums]

    def decode(self, numbers: list[Tensor]) -> Tensor:
        codes = split_last(unpack_codes(numbers[0], self.bits), UNIT)
        scales, minimums = (each.float()[..., None] for each in numbers[1:])
        return (codes * scales + minimums).flatten(2)


@dataclass(frozen=True, slots=True)
class BlockFloat:
    """`group` neighbouring elements share an exponent of 8 bits, each has a signed mantissa of 2, 4 or 8.

    With e = floor(log2 of the largest magnitude) the mantissa counts steps of 2^(e - mantissa + 2).
    """

    tokens: int
    width: int
    mantissa: int
    group: int

    @property
    def parts(self) -> tuple[Part, ...]:
        exponents = Part(torch.int8, (self.tokens, self.width // self.group))
        return Part(torch.uint8, (self.tokens, self.width * self.mantissa // 8)), exponents

    def encode(self, x: Tensor) -> list[Tensor]:
        grouped = split_last(x, self.group)
        # frexp's fractions are from 1/2 to 1. Below 2^-100 nothing is told apart: steps must be ordinary numbers.
        exponents = (torch.frexp(grouped.abs().amax(-1)).exponent - 1).clamp(-100, 127)
        half = 1 << (self.mantissa - 1)
        codes = (grouped / self._step(exponents)).round().clamp(-half, half - 1) + half
        return [pack_codes(codes.flatten(2), self.mantissa), exponents]

    def decode(self, numbers: list[Tensor]) -> Tensor:
        codes = split_last(unpack_codes(numbers[0], self.mantissa), self.group)
        half = 1 << (self.mantissa - 1)
        return ((codes - half) * self._step(numbers[1])).flatten(2)

    def _step(self, exponents: Tensor) -> Tensor:
        """float32 [..., 1], made of bits: powers of two must be exact."""
        steps: Tensor = ((exponents.int() - self.mantissa + 2 + 127) << 23).view(torch.float32)
        return steps[..., None]


def split_last(x: Tensor, group: int) -> Tensor:
    """x [..., groups * group] as [..., groups, group]."""
    return x.view(*x.shape[:-1], -1, group)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., width] of 2, 4 or 8 bits as uint8 [..., width * bits / 8]: neighbours in different bytes, so that
    whole runs are unpacked at once."""
    first, *others = codes.to(torch.uint8).chunk(8 // bits, -1)
    packed = first.clone()
    for place, part in enumerate(others, 1):
        packed |= part << (place * bits)
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The codes of `pack_codes`, float32."""
    parts = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.cat(parts, -1).float()
