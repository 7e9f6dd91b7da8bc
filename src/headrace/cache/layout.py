"""Which layers keep their KV in which cache group, so that one pool of equal blocks serves all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, gcd
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share one block table: they see the same tokens. window is None where they see all of them; where
    there is one, the first `first` tokens, in whole blocks, are seen from everywhere all the same, and with
    `keeps_prompts` all of a prompt is until it is complete.

    A block has `layer_bytes` for each layer, either exact keys and values or, `sealed`, those of a policy's own form. A
    layer whose older tokens are sealed is in two groups: a sealed one, and an exact one whose window is the tokens that
    are read exactly.
    """

    layers: tuple[int, ...]
    window: int | None = None
    layer_bytes: int = 1
    sealed: bool = False
    first: int = 0
    keeps_prompts: bool = False


class SlidingGroup(NamedTuple):
    """A cache group with a window, its tokens counted in blocks: a query sees the first `first` ones, and those from
    its window on; with `keeps_prompts` a prompt's queries see all."""

    group: int
    window: int
    first: int
    keeps_prompts: bool
    block_size: int

    def find_start(self, position: int) -> int:
        """The first block that a query at this position sees through the window."""
        return max(0, position - self.window + 1) // self.block_size

    def list_seen(self, position: int, end: int) -> list[int]:
        """The blocks before `end` that a query at this position sees."""
        start = self.find_start(position)
        return [*range(min(self.first, start)), *range(start, end)]

    def count_most(self, length: int, chunk: int, prompt: int) -> int:
        """Most blocks that are held until `length` tokens are computed, `chunk` at a time: a step sees window + chunk
        - 1 tokens through the window. prompt: tokens of one that is not complete yet, else 0."""
        chunk = max(chunk, prompt) if self.keeps_prompts else chunk
        return min(-(-length // self.block_size), (self.window + chunk - 3) // self.block_size + 2 + self.first)


class Summary(NamedTuple):
    """What a policy keeps instead of tokens that go, in whole blocks of those that the sequence holds: in each layer so
    many bytes for a token of its prompt, and so many for the sequence. block_bytes: what a block has for a layer."""

    token_bytes: int
    sequence_bytes: int
    block_bytes: int

    def count_blocks(self, prompt: int) -> int:
        """Blocks that it takes in each group."""
        return -(-(prompt * self.token_bytes + self.sequence_bytes) // self.block_bytes)


@dataclass(frozen=True, slots=True)
class Shrink:
    """When a sequence is made smaller in the cache, and how much of it stays; which tokens is the policy's matter.

    It is once its prompt is computed, and where `every` is not 0 then again at each length that is a multiple of it.
    keep: a share of its tokens if below 1, else so many tokens; only whole blocks are dropped. The attention of the
    last `queries` before that decides, None: of all since the last time. Without `every` there may be a summary of
    what goes, whose blocks stay as well: where it would take more than it saves, nothing goes.
    """

    keep: float
    every: int = 0
    queries: int | None = 0
    summary: Summary | None = None

    def count_kept(self, length: int) -> int:
        """Tokens that are to stay of so many."""
        return max(ceil(length * self.keep) if self.keep < 1 else int(self.keep), 1)

    def count_dropped(self, length: int, block_size: int) -> int:
        """Blocks that a sequence of so many tokens has lost in all."""
        summary = 0 if self.summary is None else self.summary.count_blocks(length)
        return max(0, (length - self.count_kept(length)) // block_size - summary)

    def count_most(self, length: int, prompt: int, block_size: int) -> int:
        """Most tokens that are held until `length` are computed, of a prompt of so many if it is not complete yet."""
        if not self.every:
            return length
        # Lengths at which output is made smaller end with a block, so whole blocks stay; what a prompt's end leaves
        # beyond those is no more than what has passed since the last such length.
        return max(prompt, min(length, -(-self.count_kept(length) // block_size) * block_size + self.every))

    def find_next(self, prompt: int, start: int) -> int | None:
        """The length at which a sequence of `start` tokens is made smaller next; None if it never is."""
        if start < prompt:
            return prompt
        return start // self.every * self.every + self.every if self.every else None

    def find_observed(self, prompt: int, end: int) -> int:
        """The position from which queries count for what stays at this length, one of those that `find_next` gives."""
        begin = 0 if end == prompt else max(prompt, end - self.every)
        return begin if self.queries is None else max(begin, end - self.queries)

    def cut(self, prompt: int, start: int, length: int) -> int:
        """A chunk's length, cut so that it does not go on where the sequence is made smaller."""
        end = self.find_next(prompt, start)
        return length if end is None else min(length, end - start)


class Place(NamedTuple):
    """A cache group's index, and the layer's place among its layers."""

    group: int
    layer: int


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Groups whose blocks are equally large, so that any block serves any group. block_size is in tokens.

    shares_prefixes is False where a block holds what depends on more than the tokens up to it, shrink is None where
    everything stays. A layout that shrinks shares nothing. With shares_output False only prompts are shared.
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
    def sliding(self) -> list[SlidingGroup]:
        """The groups with a window, in order."""
        size = self.block_size
        return [
            SlidingGroup(index, each.window, each.first // size, each.keeps_prompts, size)
            for index, each in enumerate(self.groups)
            if each.window is not None
        ]

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

    def blocks_for(self, length: int, chunk: int = 1, prompt: int = 0) -> int:
        """Most blocks, over all groups, that a sequence with a prompt of so many tokens holds until `length` tokens are
        computed, `chunk` at a time."""
        full = -(-self.count_held(length, prompt) // self.block_size)
        whole = sum(group.window is None for group in self.groups)
        return full * whole + self.window_blocks(length, chunk, prompt)

    def count_held(self, length: int, prompt: int) -> int:
        """Most tokens that full-attention groups hold of a sequence until `length` are computed; prompt: 0 once it is
        complete."""
        return length if self.shrink is None else self.shrink.count_most(length, prompt, self.block_size)

    def cut_chunk(self, prompt: int, start: int, length: int) -> int:
        """How many of `length` tokens one step may compute of a sequence that has `start`."""
        length = min(length, self.most_chunk or length)
        return length if self.shrink is None else self.shrink.cut(prompt, start, length)

    def window_blocks(self, length: int, chunk: int, prompt: int) -> int:
        """The share of `blocks_for` that sliding-window groups have; prompt: 0 once it is complete."""
        return sum(each.count_most(length, chunk, prompt) for each in self.sliding)

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
