"""How the blocks of two layers that share directions lie in memory, and what comes back from them.

The shallower layer's block has the keys' direction and which tokens' keys are kept, the deeper one's the same of the
values; after that both have what their own vectors are of a direction as it is read, and their kept vectors. Knows
nothing of batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.cache.policies.records import Record
from headrace.cache.policies.slerp import Merged
from headrace.kernels.base import UNIT, Kernels
from headrace.kernels.vectors import Part, VectorForm

# Of the shallower and the deeper layer, or of keys and values.
Both = tuple[Tensor, Tensor]
# What half precision holds.
LONGEST = 65504.0


@dataclass(frozen=True, slots=True)
class PairForm:
    """Blocks of so many tokens, whose vectors over all kv heads have `width` elements of this dtype.

    kept  tokens of each block whose vectors stay as they are, of keys and of values each their own
    bits  of an element of the keys' and the values' directions, 2, 4 or 8; None: as numbers

    Directions and factors are float32 beside float32, else float16, which tells finer than bfloat16.
    """

    tokens: int
    width: int
    dtype: torch.dtype
    kept: int
    bits: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of either layer's part of a block."""
        return max(self._record(part).nbytes for part in range(2))

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
        numbers = [self._find_form(part).encode(merged.direction) for part, (merged, _) in enumerate(joined)]
        # A rounded direction is not of length 1 any more.
        found = [self._find_form(part).decode(each).norm(dim=-1).clamp(min=1e-30) for part, each in enumerate(numbers)]
        for part, (plane, place, vectors) in enumerate(zip(planes, blocks, layers, strict=True)):
            lengths = [merged.second if part else merged.first for merged, _ in joined]
            factors = [(own / length).clamp(max=LONGEST) for own, length in zip(lengths, found, strict=True)]
            kept = [take(each, index) for each, (_, index) in zip(vectors, joined, strict=True)]
            self._record(part).write(plane, place, [*numbers[part], joined[part][1], *factors, *kept])

    def unpack(self, kernels: Kernels, planes: Both, blocks: Both, layer: int, into: Both) -> None:
        """Write the keys and values of the shallower (0) or the deeper (1) layer, as a cache has them, `into`."""
        record, places = self._record(layer), len(self._shared(layer))
        for part, target in enumerate(into):
            form, shared = self._find_form(part), self._record(part)
            factors = record.read(planes[layer], blocks[layer], places + part).float()
            kernels.unpack(form, planes[part], blocks[part].long(), target, factors)
            chosen = shared.read(planes[part], blocks[part], len(form.parts)).long()
            kept = record.read(planes[layer], blocks[layer], places + 2 + part)
            write_tokens(target, chosen, kept, keys=part == 0)

    def _find_form(self, part: int) -> VectorForm:
        """Of the keys' (0) or the values' (1) direction."""
        if self.bits is None:
            number = 32 if self.dtype == torch.float32 else 16
            return VectorForm(self.tokens, self.width, number, by_channel=part == 0)
        return VectorForm(self.tokens, self.width, self.bits[part], UNIT, by_channel=part == 0)

    def _record(self, layer: int) -> Record:
        return Record((*self._shared(layer), *self._own))

    def _shared(self, part: int) -> tuple[Part, ...]:
        """A direction, and the tokens that are kept."""
        return (*self._find_form(part).parts, Part(torch.int16, (self.kept,)))

    @property
    def _own(self) -> tuple[Part, ...]:
        """Factors of keys, of values, kept keys, kept values."""
        factors = Part(torch.float32 if self.dtype == torch.float32 else torch.float16, (self.tokens,))
        vectors = Part(self.dtype, (self.kept, self.width))
        return factors, factors, vectors, vectors


def take(vectors: Tensor, chosen: Tensor) -> Tensor:
    """The chosen tokens [n, k] of vectors [n, tokens, width]."""
    return vectors.gather(1, chosen.long()[..., None].expand(-1, -1, vectors.shape[2]))


def write_tokens(into: Tensor, chosen: Tensor, vectors: Tensor, keys: bool) -> None:
    """Put vectors [n, k, width] over the chosen tokens [n, k] of blocks of a cache's keys, or values, [n, ...]."""
    blocks = torch.arange(len(into), device=into.device)[:, None]
    (count, most), (_, heads, lanes, size, pair) = chosen.shape, into.shape
    if keys:
        into[blocks, :, :, chosen] = vectors.view(count, most, heads, lanes, pair)
    else:
        into[blocks, :, chosen // pair, :, chosen % pair] = vectors.view(count, most, heads, size)
