"""Which layers keep their KV in which cache group, so that one pool of equal blocks serves all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share one block table: they see the same tokens. window is None where they see all of them."""

    layers: tuple[int, ...]
    window: int | None = None


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Groups of equally many layers: a block of any group has the same size, so any block serves any group."""

    block_size: int
    groups: tuple[CacheGroup, ...]

    @classmethod
    def from_windows(cls, windows: Sequence[int | None], block_size: int) -> CacheLayout:
        """Groups for layers with these windows: as few as can be of one size, each of one window.

        A model with 15 layers of one window and 3 global ones gets 6 groups of 3 layers.
        """
        kinds: dict[int | None, list[int]] = {}
        for layer, window in enumerate(windows):
            kinds.setdefault(window, []).append(layer)
        size = gcd(*map(len, kinds.values()))
        groups = [
            CacheGroup(tuple(layers[start : start + size]), window)
            for window, layers in kinds.items()
            for start in range(0, len(layers), size)
        ]
        return cls(block_size, tuple(groups))

    @property
    def layers_per_group(self) -> int:
        return len(self.groups[0].layers)

    def place(self, layer: int) -> tuple[int, int]:
        """The layer's group, and its index within that group. Raises ValueError for a layer that is not there."""
        for index, group in enumerate(self.groups):
            if layer in group.layers:
                return index, group.layers.index(layer)
        raise ValueError(f"layer {layer} is in no cache group")
