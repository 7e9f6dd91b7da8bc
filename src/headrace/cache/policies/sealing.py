"""What policies that seal full blocks have in common: which groups there are, and when a block is sealed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from headrace.cache.layout import CacheGroup, CacheLayout
from headrace.cache.policies.base import KVShape, LayerStep
from headrace.core import InputError
from headrace.kernels.base import LARGEST_HEAD, LARGEST_SEALED_BLOCK, UNIT

# The text for which the groups are made to waste the least.
TYPICAL_TOKENS = 1024
# So much more memory than the least is worth having fewer groups to look after.
SPARED = 1.05


def arrange_sealed(shape: KVShape, block_size: int, sealed_bytes: int, exact: CacheGroup) -> CacheLayout:
    """Layers that see all tokens are sealed, in `sealed_bytes` a layer and block, and what they have exactly is in
    groups like `exact`; those with a window stay exact, in as many bytes.

    Blocks are equally large: an exact block has fewer layers than a sealed one. How many is chosen so that there are
    few groups, and a text of 1,024 tokens takes little more than the least memory. Raises InputError for shapes that
    cannot be sealed.
    """
    check_sealable(shape, block_size)
    whole = [layer for layer, window in enumerate(shape.windows) if window is None]
    if not whole:
        raise InputError("every layer of this model has a sliding window: there is nothing to seal; use kv plain")
    kinds = [(exact, whole)]
    for window in sorted({each for each in shape.windows if each is not None}):
        layers = [layer for layer, each in enumerate(shape.windows) if each == window]
        kinds.append((CacheGroup((), window, exact.layer_bytes), layers))

    def make(sealed_layers: int, exact_layers: int) -> CacheLayout:
        groups = [CacheGroup(layers, None, sealed_bytes, True) for layers in cut(whole, sealed_layers)]
        for kind, layers in kinds:
            groups += [replace(kind, layers=part) for part in cut(layers, exact_layers)]
        return CacheLayout(block_size, tuple(groups))

    counts = range(1, len(whole) + 1)
    choices = [make(*each) for each in product(counts, counts)]
    enough = min(count_bytes(layout, TYPICAL_TOKENS) for layout in choices) * SPARED
    fitting = [layout for layout in choices if count_bytes(layout, TYPICAL_TOKENS) <= enough]
    return min(fitting, key=lambda layout: (len(layout.groups), count_bytes(layout, TYPICAL_TOKENS)))


def check_sealable(shape: KVShape, block_size: int) -> None:
    """Raises InputError for blocks that cannot be sealed."""
    for name, size, most in (
        ("block_size", block_size, LARGEST_SEALED_BLOCK),
        ("head size", shape.head_size, LARGEST_HEAD),
    ):
        if size % UNIT:
            raise InputError(f"{name} {size} cannot be sealed: it must be a multiple of {UNIT}")
        if size > most:
            raise InputError(f"{name} {size} cannot be sealed: it must be at most {most}")


def cut(layers: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(layers[start : start + size]) for start in range(0, len(layers), size)]


def count_bytes(layout: CacheLayout, tokens: int) -> int:
    """Bytes that a text of so many tokens takes while its next one is computed."""
    size = layout.block_size
    blocks = [-(-min(tokens, (group.window or tokens) + size + group.first) // size) for group in layout.groups]
    return sum(blocks) * layout.block_bytes


def seal_filled(step: LayerStep) -> None:
    """Seal the blocks of the layer that this step has filled."""
    cache, filled = step.cache, step.batch.filled
    if cache.sealed is not None and len(filled[cache.group]):
        step.kernels.seal(cache, filled[cache.group], filled[cache.sealed_group])
