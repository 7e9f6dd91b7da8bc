"""Which layers keep their KV in which cache group, so that one pool of equal blocks serves all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, gcd
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share one block table: they see the same tokens. window is None where they see all of them.

    A block has `layer_bytes` for each layer, either exact keys and values or, `sealed`, those of a policy's own form. A
    layer whose older tokens are sealed is in two groups: a sealed one, and an exact one whose window is the tokens that
    are read exactly.
    """

    layers: tuple[int, ...]
    window: int | None = None
    layer_bytes: int = 1
    sealed: bool = False


@dataclass(frozen=True, slots=True)
class Shrink:
    """How much of a prompt stays in the cache once all of it is computed; which tokens is the policy's matter.

    keep: a share of the prompt's tokens if below 1, else so many tokens; only whole blocks are dropped.
    """

    keep: float

    def count_dropped(self, prompt: int, block_size: int) -> int:
        """Blocks that a prompt of so many tokens loses."""
        kept = ceil(prompt * self.keep) if self.keep < 1 else int(self.keep)
        return max(0, prompt - max(kept, 1)) // block_size

    def cut(self, prompt: int, start: int, length: int) -> int:
        """A chunk's length, cut so that it does not go on behind the prompt."""
        return min(length, prompt - start) if start < prompt else length


class Place(NamedTuple):
    """A cache group's index, and the layer's place among its layers."""

    group: int
    layer: int


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Groups whose blocks are equally large, so that any block serves any group. block_size is in tokens.

    shares_prefixes is False where a block holds what depends on more than the tokens up to it, shrink is None where
    prompts stay as they are. A layout that shrinks shares nothing. With shares_output False only prompts are shared.
    most_chunk is how many tokens of a sequence one step may compute, most_read how many an output token reads; None
    where there is no such bound.
    """

    block_size: int
    groups: tuple[CacheGroup, ...]
    shares_prefixes: bool = True
    shrink: Shrink | None = None
    shares_output: bool = True
    most_chunk: int | None = None
    most_read: int | None = None

    @classmethod
    def from_windows(cls, windows: Sequence[int | None], block_size: int, layer_bytes: int = 1) -> CacheLayout:
        """Groups for exact layers with these windows: as few as can be of one size, each of one window.

        A model with 15 layers of one window and 3 global ones gets 6 groups of 3 layers.
        """
        kinds: dict[int | None, list[int]] = {}
        for layer, window in enumerate(windows):
            kinds.setdefault(window, []).append(layer)
        size = gcd(*map(len, kinds.values()))
        groups = [
            CacheGroup(tuple(layers[start : start + size]), window, layer_bytes)
            for window, layers in kinds.items()
            for start in range(0, len(layers), size)
        ]
        return cls(block_size, tuple(groups))

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: what the largest group needs for block_size tokens of its layers."""
        return max(len(group.layers) * group.layer_bytes for group in self.groups)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one more token of a long text takes over all layers."""
        whole = sum(group.window is None for group in self.groups) or len(self.groups)
        return self.block_bytes * whole / self.block_size

    @property
    def older_token_bytes(self) -> float | None:
        """Bytes of one older token in a layer that sees all tokens, the mean of such layers; None if there are none."""
        whole = [group for group in self.groups if group.window is None]
        layers = sum(len(group.layers) for group in whole)
        total = sum(len(group.layers) * group.layer_bytes for group in whole)
        return total / layers / self.block_size if layers else None

    def count_blocks(self, tokens: int) -> int:
        """Blocks that a text of so many tokens never takes more than."""
        return len(self.groups) * -(-tokens // self.block_size)

    def place(self, layer: int) -> Place:
        """Where the layer's exact blocks are. Raises ValueError for a layer that is not there."""
        for index, group in enumerate(self.groups):
            if layer in group.layers and not group.sealed:
                return Place(index, group.layers.index(layer))
        raise ValueError(f"layer {layer} is in no cache group")

    def place_sealed(self, layer: int) -> Place | None:
        """Where the layer's sealed blocks are; None if it has none."""
        for index, group in enumerate(self.groups):
            if layer in group.layers and group.sealed:
                return Place(index, group.layers.index(layer))
        return None
