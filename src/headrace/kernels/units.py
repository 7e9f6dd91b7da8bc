"""Sealed blocks in plain torch: from keys and values to codes, scales and middles, and back. The oracle of sealing.

Knows the bytes of a unit (32 tokens of one kv head); csrc/sealed.h describes the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.base import UNIT, SealedForm
from headrace.kernels.vectors import restore_groups, round_groups


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes along the last dimension as words, [..., planes, words] int32: a word of 32 / bits codes has even places in
    its lower half and odd ones in its upper half; 8 bits are two planes of 4, the lower halves first."""
    plane_bits = min(bits, 4)
    planes = torch.stack([codes >> shift & (2**plane_bits - 1) for shift in range(0, bits, plane_bits)], -2)
    count = 32 // plane_bits
    words = planes.view(*planes.shape[:-1], -1, count)
    shifts = torch.tensor([place % 2 * 16 + place // 2 * plane_bits for place in range(count)], device=codes.device)
    # A word with its highest bit set is a negative number to torch.
    whole = (words << shifts).sum(-1)
    return torch.where(whole >> 31 == 1, whole - 2**32, whole).int()


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The codes of `pack_words`, int64."""
    plane_bits = min(bits, 4)
    count = 32 // plane_bits
    shifts = torch.tensor([place % 2 * 16 + place // 2 * plane_bits for place in range(count)], device=words.device)
    planes = ((words.long()[..., None] >> shifts) & (2**plane_bits - 1)).flatten(-2)
    weights = torch.tensor([16**plane for plane in range(bits // plane_bits)], device=words.device)
    codes: Tensor = (planes * weights[:, None]).sum(-2)
    return codes


def pack_units(keys: Tensor, values: Tensor, form: SealedForm) -> Tensor:
    """Keys and values float32 [kv heads, n * 32, D] as n units each, uint8 [kv heads, n, bytes of a unit]."""
    heads, _, size = keys.shape
    by_channel = keys.reshape(heads, -1, UNIT, size).transpose(2, 3)  # [heads, units, D, 32]
    by_token = values.reshape(heads, -1, UNIT, size // UNIT, UNIT)  # [heads, units, 32, groups, 32]
    codes, scales, middles = round_groups(by_channel, form.key_bits)
    parts = [pack_words(codes.transpose(2, 3), form.key_bits).permute(0, 1, 3, 4, 2)]  # [.., planes, words, 32 tokens]
    parts += [scales, middles]
    codes, scales, middles = round_groups(by_token, form.value_bits)
    by_column = codes.flatten(3).transpose(2, 3)  # [heads, units, D, 32 tokens]
    parts.append(pack_words(by_column, form.value_bits).permute(0, 1, 3, 4, 2))  # [.., planes, words, D]
    parts += [scales.transpose(2, 3), middles.transpose(2, 3)]
    flat = [part.contiguous().flatten(2).view(torch.uint8) for part in parts]
    return torch.cat(flat, -1)


def unpack_units(units: Tensor, form: SealedForm, size: int) -> tuple[Tensor, Tensor]:
    """Keys and values float32 [kv heads, tokens, D] of units uint8 [heads, units, bytes], as `pack_units` made them."""
    heads, count, _ = units.shape
    lengths = [size * form.key_bits * 4, size * 2, size, size * form.value_bits * 4, size * 2, size]
    types = [torch.int32, torch.float16, torch.uint8] * 2
    parts = [part.contiguous().view(dtype) for part, dtype in zip(torch.split(units, lengths, -1), types, strict=True)]
    planes = [max(1, bits // 4) for bits in (form.key_bits, form.value_bits)]
    words = parts[0].view(heads, count, planes[0], -1, UNIT).permute(0, 1, 4, 2, 3)
    scales, middles = (part[:, :, None] for part in parts[1:3])
    keys = restore_groups(unpack_words(words, form.key_bits), scales, middles, form.key_bits)
    words = parts[3].view(heads, count, planes[1], -1, size).permute(0, 1, 4, 2, 3)
    codes = unpack_words(words, form.value_bits).transpose(2, 3)  # [heads, units, 32, D]
    scales, middles = (
        part.view(heads, count, -1, UNIT).transpose(2, 3).repeat_interleave(UNIT, 3) for part in parts[4:6]
    )
    return keys.flatten(1, 2), restore_groups(codes, scales, middles, form.value_bits).flatten(1, 2)
