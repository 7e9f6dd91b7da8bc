"""Vectors of a block's tokens in a policy's own bytes, in plain torch: the oracle of unpacking.

Knows how vectors become numbers and back; csrc/unpack.h reads the same bytes. Which blocks, when, and for whom is a
policy's.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

# A little less than the largest middle in grains, so that it stays in reach when the scale is rounded.
FARTHEST = 3900
# Far below what half precision tells from nothing.
LEAST_SCALE = 1e-30


@dataclass(frozen=True, slots=True)
class Part:
    """Numbers of one kind in each block."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class VectorForm:
    """How the keys or the values of a block lie in memory, all kv heads side by side: `width` elements a token.

    bits        16 or 32: elements are numbers, float16 or float32; 2, 4 or 8: codes
    group       codes: so many neighbouring elements of a token share a scale
    exponents   codes: False: each group has a scale (float16) and a middle (uint8) as in `round_groups`; True: a scale
                alone, a power of two, int8 e, and a code means (code - 2^(bits - 1)) * 2^(e - bits + 2)
    by_channel  a row of elements is a channel's of all tokens, as exact keys have them; else a token's of all channels
    """

    tokens: int
    width: int
    bits: int
    group: int = 1
    exponents: bool = False
    by_channel: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8, 16, 32):
            raise ValueError(f"elements have 2, 4, 8, 16 or 32 bits, not {self.bits}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """What there is of a block, one after the other: elements by row, then scales likewise, then middles."""
        rows, columns = self._turn(self.tokens, self.width)
        if self.bits > 8:
            return (Part(torch.float32 if self.bits == 32 else torch.float16, (rows, columns)),)
        shared = self._turn(self.tokens, self.width // self.group)
        types = [torch.int8] if self.exponents else [torch.float16, torch.uint8]
        return (Part(torch.uint8, (rows, columns * self.bits // 8)), *(Part(each, shared) for each in types))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def take(self, whole: Tensor) -> list[Tensor]:
        """The parts out of the first bytes of blocks, uint8 [n, at least nbytes]."""
        lengths = [part.nbytes for part in self.parts]
        pieces = torch.split(whole[:, : self.nbytes], lengths, 1)
        return [
            piece.contiguous().view(part.dtype).view(-1, *part.shape)
            for part, piece in zip(self.parts, pieces, strict=True)
        ]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Vectors float32 [n, tokens, width] as a tensor [n, ...] for each part."""
        if self.bits > 8:
            return [self._lay(x).to(self.parts[0].dtype)]
        grouped = x.view(*x.shape[:-1], -1, self.group)
        if not self.exponents:
            codes, *scales = round_groups(grouped, self.bits)
        else:
            # frexp's fractions are from 1/2 to 1. Below 2^-100 nothing is told apart: steps must be ordinary numbers.
            largest = grouped.abs().amax(-1)
            exponents = (torch.frexp(largest).exponent - 1).clamp(-100, 127)
            half = 1 << (self.bits - 1)
            steps = make_steps(exponents, self.bits)[..., None]
            codes, scales = (grouped / steps).round().clamp(-half, half - 1) + half, [exponents]
            # The least code of the largest exponent is -2^128: what is no number does not become one.
            exponents[~largest.isfinite()] = 127
            codes[~largest.isfinite()] = 0
        return [pack_codes(self._lay(codes.flatten(2)), self.bits), *map(self._lay, scales)]

    def decode(self, numbers: list[Tensor]) -> Tensor:
        """The vectors again, float32."""
        if self.bits > 8:
            return self._lay(numbers[0].float())
        codes = self._lay(unpack_codes(numbers[0], self.bits))
        codes = codes.view(*codes.shape[:-1], -1, self.group)
        scales = [self._lay(each)[..., None] for each in numbers[1:]]
        if self.exponents:
            return ((codes - (1 << (self.bits - 1))) * make_steps(scales[0], self.bits)).flatten(2)
        return restore_groups(codes, scales[0], scales[1], self.bits).flatten(2)

    def _turn(self, tokens: int, channels: int) -> tuple[int, int]:
        return (channels, tokens) if self.by_channel else (tokens, channels)

    def _lay(self, x: Tensor) -> Tensor:
        """From [n, tokens, channels] to rows, and back."""
        return x.transpose(1, 2).contiguous() if self.by_channel else x


def grain_of(bits: int) -> float:
    """So many codes does a middle of 1 stand for: a 256th of what so many bits tell apart."""
    return (1 << bits) / 256


def round_groups(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (int64, like x), scales (float16) and middles (uint8, both without the last dimension) of groups along x's
    last dimension: asymmetric rounding to nearest (KIVI, section 3.1), scales and middles rounded first.

    KIVI keeps a group's least number beside its scale; here the middle of what its codes can mean is kept in a byte
    (`encode_middles`, in grains). Codes are rounded to what that makes of them. Where a middle may be off by more than
    half a code, the scale is made larger by as much: by a tenth for 4 bits four spreads off zero, by a third eight off,
    for 8 bits by twice that. So nothing is wrong by more than half a scale, and what rounding the scale itself adds: at
    the ends 2^bits / 4096 of it, and more where it is below 6e-5, half precision's least ordinary number.
    """
    least, most = x.amin(-1), x.amax(-1)
    grain, levels = grain_of(bits), 2**bits - 1
    middle, spread = (least + most) / 2, most - least
    far = middle.abs() / (FARTHEST * grain)
    narrow = (spread / levels).maximum(far)
    exponents = torch.frexp(torch.where(narrow > LEAST_SCALE, middle.abs() / narrow / grain, 0.0) + 16).exponent
    # The codes between neighbouring middles, but for the one that rounding codes to nearest allows.
    slack = (torch.ldexp(torch.full_like(spread, grain), exponents - 5) - 1).clamp_min(0)
    scales = (spread / (levels - slack)).maximum(far).half()
    step = scales.float()
    middles = encode_middles(torch.where(step > 0, middle / step / grain, 0.0))
    places = torch.where(step[..., None] > 0, x / step[..., None] - find_starts(middles, bits)[..., None], 0.0)
    return places.clamp(0, levels).round().long(), scales, middles


def restore_groups(codes: Tensor, scales: Tensor, middles: Tensor, bits: int) -> Tensor:
    """The numbers, float32, of codes in any order; their scales and middles are laid out so that they broadcast."""
    return (codes + find_starts(middles, bits)) * scales.float()


def find_starts(middles: Tensor, bits: int) -> Tensor:
    """What is added to codes before they are multiplied by the scale, float32."""
    return decode_middles(middles) * grain_of(bits) - ((1 << bits) - 1) / 2


def encode_middles(x: Tensor) -> Tensor:
    """The nearest numbers that a byte tells, uint8: a sign, three bits e and four bits m for ((16 + m) << e) - 16, up
    to 3,952. Off by half at most up to 16, and beyond by at most a sixteenth of the number."""
    magnitude = x.abs() + 16
    exponents = torch.frexp(magnitude).exponent - 5
    codes = exponents * 16 + torch.ldexp(magnitude, -exponents).round() - 16
    return (codes.clamp_max(127) + 128 * (x < 0)).to(torch.uint8)


def decode_middles(encoded: Tensor) -> Tensor:
    """The numbers of `encode_middles`, float32."""
    codes = encoded.int()
    magnitude = (16 + (codes & 15) << (codes >> 4 & 7)) - 16
    return torch.where(codes > 127, -magnitude, magnitude).float()


def make_steps(exponents: Tensor, bits: int) -> Tensor:
    """2^(exponent - bits + 2) in float32, made of bits: powers of two must be exact."""
    steps: Tensor = ((exponents.int() - bits + 2 + 127) << 23).view(torch.float32)
    return steps


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


def lay_vectors(vectors: Tensor, like: Tensor, keys: bool) -> Tensor:
    """Vectors [n, tokens, width] of blocks, laid out as exact keys, or values, like these are."""
    if keys:
        _, heads, lanes, size, pair = like.shape
        return vectors.view(-1, size, heads, lanes, pair).permute(0, 2, 3, 1, 4)
    _, heads, lanes, head_size, pair = like.shape
    return vectors.view(-1, lanes, pair, heads, head_size).permute(0, 3, 1, 4, 2)
