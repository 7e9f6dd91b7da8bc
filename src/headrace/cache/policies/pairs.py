"""How the blocks of two layers that share directions lie in memory, and what comes back from them.

The shallower layer's block has the keys' direction and which tokens' keys are kept, the deeper one's the same of the
values; after that both have their own lengths and kept vectors. Knows nothing of batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.cache.policies.records import ByToken, Codec, Part, Record, Whole
from headrace.cache.policies.slerp import Merged, normalise

# Of the shallower and the deeper layer, or of keys and values.
Both = tuple[Tensor, Tensor]
# What half precision holds.
LONGEST = 65504.0


@dataclass(frozen=True, slots=True)
class PairForm:
    """Blocks of so many tokens, whose vectors over all kv heads have `width` elements of this dtype.

    kept  tokens of each block whose vectors stay as they are, of keys and of values each their own
    bits  of an element of the keys' and the values' directions, 2, 4 or 8; None: as numbers

    Directions and lengths are float32 beside float32, else float16, which tells finer than bfloat16.
    """

    tokens: int
    width: int
    dtype: torch.dtype
    kept: int
    bits: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of either layer's part of a block."""
        return max(Record((*self._shared(part), *self._own)).nbytes for part in range(2))

    def write(
        self,
        planes: Both,
        blocks: Both,
        layers: tuple[Both, Both],
        join: Callable[[Tensor, Tensor], tuple[Merged, Tensor]],
    ) -> None:
        """Put n blocks into both layers' planes, uint8 [blocks, nbytes], the shallower layer's first everywhere.

        layers: the keys and values of each, float32 [n, tokens, width]. join makes one direction of two such, and says
        which tokens are kept, int64 [n, kept].
        """
        joined = [join(*both) for both in zip(*layers, strict=True)]
        for part, (plane, place, vectors) in enumerate(zip(planes, blocks, layers, strict=True)):
            direction, chosen = joined[part]
            numbers = [*self._codec(part).encode(direction.direction), chosen]
            lengths = [(merged.second if part else merged.first).clamp(max=LONGEST) for merged, _ in joined]
            kept = [take(each, index) for each, (_, index) in zip(vectors, joined, strict=True)]
            Record((*self._shared(part), *self._own)).write(plane, place, [*numbers, *lengths, *kept])

    def read(self, planes: Both, blocks: Both, layer: int) -> Both:
        """Keys and values, float32 [n, tokens, width], of the shallower (0) or the deeper (1) layer."""
        record = Record((*self._shared(layer), *self._own))
        own = record.read(planes[layer], blocks[layer])[-len(self._own) :]
        found = []
        for part in range(2):
            *numbers, chosen = Record(self._shared(part)).read(planes[part], blocks[part])
            lengths, kept = own[part].float(), own[2 + part].float()
            vectors = normalise(self._codec(part).decode(numbers)) * lengths[..., None]
            found.append(vectors.scatter(1, spread(chosen, self.width), kept))
        return found[0], found[1]

    def _codec(self, part: int) -> Codec:
        """Of the keys' (0) or the values' (1) direction."""
        if self.bits is None:
            return Whole(self.tokens, self.width, self._number)
        return ByToken(self.tokens, self.width, self.bits[part])

    @property
    def _number(self) -> torch.dtype:
        return torch.float32 if self.dtype == torch.float32 else torch.float16

    def _shared(self, part: int) -> tuple[Part, ...]:
        """A direction, and the tokens that are kept."""
        return (*self._codec(part).parts, Part(torch.int16, (self.kept,)))

    @property
    def _own(self) -> tuple[Part, ...]:
        """Lengths of keys, of values, kept keys, kept values."""
        lengths, vectors = Part(self._number, (self.tokens,)), Part(self.dtype, (self.kept, self.width))
        return lengths, lengths, vectors, vectors


def take(vectors: Tensor, chosen: Tensor) -> Tensor:
    """The chosen tokens [n, k] of vectors [n, tokens, width]."""
    return vectors.gather(1, spread(chosen, vectors.shape[2]))


def spread(chosen: Tensor, width: int) -> Tensor:
    """Tokens [n, k] as indices of all elements of their vectors, int64 [n, k, width]."""
    return chosen.long()[..., None].expand(-1, -1, width)
