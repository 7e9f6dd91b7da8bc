"""Groups for models whose layers are kept in different ways: some exact, some sealed in one form, some in another."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.cache.layout import CacheGroup, CacheLayout
from headrace.cache.policies.base import KVShape
from headrace.cache.policies.sealing import SPARED, TYPICAL_TOKENS, count_bytes, cut


def arrange_layers(
    shape: KVShape, block_size: int, sealed: Mapping[int, int], residual: int, most_chunk: int | None = None
) -> CacheLayout:
    """Layers by number are sealed in at least so many bytes a block, and exact within the residual; all others stay
    exact.

    Blocks are equally large, and groups have as many layers as fit. How large they are, and whether layers that need
    fewer bytes get as many as the others so that they fit into one group, is chosen as in `arrange_sealed`.
    """
    exact_bytes = shape.count_layer_bytes(block_size)
    widest = dict.fromkeys(sealed, max(sealed.values(), default=0))
    choices = []
    for sealed_bytes in (sealed, widest):
        kinds: dict[tuple[int | None, int, bool], list[int]] = {}
        for layer, window in enumerate(shape.windows):
            if layer in sealed_bytes:
                kinds.setdefault((None, sealed_bytes[layer], True), []).append(layer)
            kinds.setdefault((residual if layer in sealed else window, exact_bytes, False), []).append(layer)
        least = max(layer_bytes for _, layer_bytes, _ in kinds)
        sizes = {count * kind[1] for kind, layers in kinds.items() for count in range(1, len(layers) + 1)}
        for size in sorted(size for size in sizes if size >= least):
            groups = [group for kind, layers in kinds.items() for group in make_groups(*kind, layers, size)]
            choices.append(CacheLayout(block_size, tuple(groups), most_chunk=most_chunk))
    enough = min(count_bytes(layout, TYPICAL_TOKENS) for layout in choices) * SPARED
    fitting = [layout for layout in choices if count_bytes(layout, TYPICAL_TOKENS) <= enough]
    return min(fitting, key=lambda layout: (len(layout.groups), count_bytes(layout, TYPICAL_TOKENS)))


def make_groups(
    window: int | None, layer_bytes: int, sealed: bool, layers: list[int], block_bytes: int
) -> list[CacheGroup]:
    """Groups of these layers, as few as blocks of this size allow, and equally large."""
    count = -(-len(layers) // (block_bytes // layer_bytes))
    parts = cut(layers, -(-len(layers) // count))
    return [CacheGroup(part, window, layer_bytes, sealed) for part in parts]
