"""A prompt's keys as a product of small matrices, in blocks of the cache: how it lies there, and what is chosen of it.

In plain torch: the oracle of csrc/recall.h, which reads the same rows. When a prompt is brought into this form, and
how, is a policy's matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 8


@dataclass(frozen=True, slots=True)
class BlockRows:
    """A layer's part of some exact blocks as rows of D numbers, one block's after the other's: no kernel reads tokens
    there.

    rows    [all blocks, rows of a block, D], the layer's keys and values seen as rows
    blocks  int32 [n], which of them
    """

    rows: Tensor
    blocks: Tensor

    @classmethod
    def view(cls, keys: Tensor, values: Tensor, blocks: Tensor) -> BlockRows:
        """Of a layer's keys and values as a cache has them. Raises ValueError where values do not follow their keys."""
        if values.data_ptr() != keys.data_ptr() + keys[0].nbytes:
            raise ValueError("a block's values must follow its keys")
        size = values.shape[3]
        count = keys[0].numel() // size
        return cls(keys.as_strided((len(keys), 2 * count, size), (keys.stride(0), size, 1)), blocks)

    def write(self, rows: Tensor) -> None:
        """Write rows [m, D] from the first on; what is left is zero."""
        whole = functional.pad(rows, (0, 0, 0, len(self.blocks) * self.rows.shape[1] - len(rows)))
        self.rows[self.blocks.long()] = whole.view(len(self.blocks), -1, whole.shape[1]).to(self.rows.dtype)

    def read(self, first: int, count: int) -> Tensor:
        """Neighbouring rows [count, D]."""
        size = self.rows.shape[1]
        blocks = self.blocks[first // size : -(-(first + count) // size)]
        return self.rows[blocks.long()].flatten(0, 1)[first % size :][:count]

    def pick(self, places: Tensor) -> Tensor:
        """Rows [..., D] at these places, int64."""
        return self.rows[self._find(places)]

    def put(self, places: Tensor, rows: Tensor) -> None:
        """Write rows [..., D] at these places, int64."""
        self.rows[self._find(places)] = rows

    def _find(self, places: Tensor) -> tuple[Tensor, Tensor]:
        size = self.rows.shape[1]
        return self.blocks[places // size].long(), places % size


@dataclass(frozen=True, slots=True)
class ShadowRows:
    """One layer of what stands for a prompt's first chunks of CHUNK tokens, n of them, as it lies in blocks of the
    cache: rows of D numbers in the cache's dtype.

    places       int32 [kv heads, count], one more than the chunk that `Kernels.recall` has written in each place; or 0
    landmarks    [n, kv heads], means of rotated keys, marked where the chunk stays exact and is not to be chosen
    directions   [kv heads, rank] and
    coordinates  [n, rows], CHUNK * rank numbers of each chunk, whose product is the keys before rotation
    values       [n, kv heads, CHUNK], unless they lie elsewhere: then `values` [kv heads, n, CHUNK, D] are those
    """

    rows: BlockRows
    heads: int
    chunks: int
    count: int
    rank: int
    values: Tensor | None = None

    @property
    def size(self) -> int:
        return self.rows.rows.shape[2]

    def write(self, landmarks: Tensor, directions: Tensor, coordinates: Tensor, values: Tensor | None) -> None:
        """landmarks [kv heads, n, D], directions [kv heads, rank, D], coordinates [N, rank], values [kv heads, n,
        CHUNK, D]. Nothing is in any place yet."""
        joined = coordinates.view(self.chunks, -1)
        padded = functional.pad(joined, (0, count_rows(self.rank, self.size) * self.size - joined.shape[1]))
        places = landmarks.new_zeros(self._count_place_rows(), self.size)
        parts = [places, landmarks.transpose(0, 1), directions, padded]
        parts += [] if values is None else [values.transpose(0, 1)]
        self.rows.write(torch.cat([part.reshape(-1, self.size) for part in parts]))

    def read_landmarks(self) -> Tensor:
        """[kv heads, n, D]"""
        found = self.rows.read(self._count_place_rows(), self.chunks * self.heads)
        return found.view(-1, self.heads, self.size).transpose(0, 1)

    def restore_keys(self, chosen: Tensor) -> Tensor:
        """Keys before rotation, float32 [kv heads, count * CHUNK, D], of chunks int64 [kv heads, count], each head its
        own."""
        first, count, rows = self._count_place_rows() + self.chunks * self.heads, self.heads * self.rank, self.rows
        directions = rows.read(first, count).view(self.heads, self.rank, self.size)
        each = count_rows(self.rank, self.size)
        places = first + count + chosen[..., None] * each + torch.arange(each, device=chosen.device)
        coordinates = rows.pick(places).flatten(2)[..., : CHUNK * self.rank]
        return coordinates.reshape(self.heads, -1, self.rank).float() @ directions.float()

    def read_values(self, chosen: Tensor) -> Tensor:
        """The same of values: [kv heads, count * CHUNK, D]."""
        heads = torch.arange(self.heads, device=chosen.device)[:, None]
        if self.values is not None:
            return (
                self.values[heads.to(self.values.device), chosen.to(self.values.device)].to(chosen.device).flatten(1, 2)
            )
        first = self._count_place_rows() + self.heads * self.rank
        first += self.chunks * (self.heads + count_rows(self.rank, self.size))
        within = torch.arange(CHUNK, device=chosen.device)
        return self.rows.pick(first + ((chosen * self.heads + heads) * CHUNK)[..., None] + within).flatten(1, 2)

    def write_places(self, chosen: Tensor) -> None:
        """Chunks int64 [kv heads, count] are in the places."""
        rows = self.rows
        bits = (chosen + 1).int().flatten().view(rows.rows.dtype)
        places = torch.arange(self._count_place_rows(), device=chosen.device)
        rows.put(places, functional.pad(bits, (0, len(places) * self.size - len(bits))).view(-1, self.size))

    def _count_place_rows(self) -> int:
        return count_place_rows(self.heads * self.count, self.size * self.rows.rows.itemsize)


def count_rows(rank: int, size: int) -> int:
    """Rows of so many numbers that the coordinates of a chunk take."""
    return -(-CHUNK * rank // size)


def count_place_rows(places: int, row_bytes: int) -> int:
    """Rows of so many bytes that it takes to say what is in so many places."""
    return -(-places * 4 // row_bytes)


def choose_chunks(queries: Tensor, landmarks: Tensor, count: int, scale: float) -> Tensor:
    """The chunks whose landmarks [kv heads, n, D] queries [heads, D] attend to most, int64 [kv heads, count] ascending,
    but for marked ones. A kv head's chunks are chosen by the largest weight that any of its queries gives them, the
    first of equal ones."""
    marked = landmarks[:, :, 0] == torch.finfo(landmarks.dtype).max
    grouped = queries.float().reshape(len(landmarks), -1, queries.shape[1])
    scores = grouped @ landmarks.float().transpose(1, 2) * scale
    # Their logarithms, of which none is too small to be told from others.
    weights = scores.masked_fill(marked[:, None], -torch.inf).log_softmax(-1).amax(1)
    return weights.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values
