"""ShadowKV (arXiv 2410.21465): a prompt's keys as a product of small matrices, its values on a slower tier.

As in section 4 of the paper: while a prompt is computed all is exact. At its end the keys before rotation are brought
to a low rank, the means of 8 rotated keys each become landmarks, the chunks that their landmark tells least about stay
exact, and so do the newest tokens. An output token chooses chunks by their landmarks; their keys are made again, their
values fetched. Here what it chose is written into blocks that the prompt keeps, so that the ordinary kernels read it
together with the rest, in a loop over sequences; nothing is fetched while something else is computed.

What is kept beside the arena is counted by `count_bytes` and is not within the KV budget; only the arena's blocks are.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from headrace.cache.layout import CacheLayout, Shrink
from headrace.cache.policies.base import KVShape, LayerStep, Plane
from headrace.cache.policies.parameters import check_number
from headrace.cache.policies.selecting import map_file, take_token
from headrace.core import InputError
from headrace.kernels.base import HeadSpec, SealedForm
from headrace.kernels.reference import read_blocks, rotate, take_head, write_slots

CHUNK = 8


@dataclass(frozen=True, slots=True)
class LayerShadow:
    """What stands for a prompt's first N tokens in one layer; in the cache's dtype but for `chunks`.

    coordinates  [N, rank] and
    directions   [kv heads, rank, D], whose product is the keys before rotation
    landmarks    [kv heads, n, D], means of the rotated keys of
    chunks       int64 [kv heads, n], ascending: those that are not kept exact
    """

    coordinates: Tensor
    directions: Tensor
    landmarks: Tensor
    chunks: Tensor

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.coordinates, self.directions, self.landmarks, self.chunks))


@dataclass(slots=True)
class Shadow:
    """A sequence's prompt: its layers, and on the slow tier values [layers, kv heads, N / CHUNK, CHUNK, D]."""

    values: Tensor
    layers: dict[int, LayerShadow] = field(default_factory=dict)


class ShadowKV:
    """See `KVPolicy`. Layers with sliding windows stay as they are."""

    form: SealedForm | None = None
    residual = 1
    planes: tuple[Plane, ...] = ()

    def __init__(self, rank: int = 96, budget: int = 128, outliers: int = 3, local: int = 32, folder: str = "") -> None:
        """rank: of the keys of all heads of a layer together. budget: prompt tokens that an output token chooses, each
        kv head its own, rounded up to whole blocks. outliers: chunks of 8 tokens that stay exact. local: the least of
        a prompt's newest tokens that stay exact. folder: for the values; "" for the system's temporary one."""
        for name, value, low in (
            ("rank", rank, 1),
            ("budget", budget, 1),
            ("outliers", outliers, 0),
            ("local", local, 1),
        ):
            check_number("shadowkv", name, value, low, 1 << 20)
        if folder and not Path(folder).is_dir():
            raise InputError(f"kv shadowkv: folder {folder!r} is no folder")
        self.rank, self.budget, self.outliers, self.local, self.folder = rank, budget, outliers, local, folder
        self._whole: list[int] = []
        self._shadows: dict[int, Shadow] = {}

    def arrange(self, shape: KVShape, block_size: int) -> CacheLayout:
        self._whole = [layer for layer, window in enumerate(shape.windows) if window is None]
        if not self._whole:
            raise InputError("every layer of this model has a sliding window: there is nothing to shrink; use kv plain")
        layout = CacheLayout.from_windows(shape.windows, block_size, shape.count_layer_bytes(block_size))
        kept = self._count_kept(block_size) + self.local
        return replace(layout, shares_prefixes=False, shrink=Shrink(kept))

    def attend(self, step: LayerStep) -> Tensor:
        batch = step.batch
        if step.spec.window is not None:
            return step.kernels.attention(step.queries, step.cache, replace(batch, begins=None), step.spec)
        starts = batch.query_starts.tolist()
        long = []
        for sequence, number in enumerate(batch.numbers if batch.begins is not None else ()):
            if number in self._shadows and int(batch.begins[sequence]):  # type: ignore[index]
                if starts[sequence + 1] - starts[sequence] == 1:
                    self._fetch(step, sequence, starts[sequence])
                else:
                    long.append(sequence)
        output = step.kernels.attention(step.queries, step.cache, batch, step.spec)
        for sequence in long:
            # An output that is computed again, after a preemption: each token chooses for itself.
            for row in range(starts[sequence], starts[sequence + 1]):
                self._fetch(step, sequence, row)
                alone = take_token(batch, sequence, row)
                output[row] = step.kernels.attention(step.queries[row : row + 1], step.cache, alone, step.spec)[0]
        if batch.shrinks is not None:
            for sequence in batch.shrinks.nonzero().flatten().tolist():
                self._keep(step, sequence)
        return output

    def release(self, number: int) -> None:
        """A sequence has ended, or begins anew later: nothing of it is wanted any more."""
        self._shadows.pop(number, None)

    def count_bytes(self) -> dict[str, int]:
        """Bytes that are kept beside the arena now, by tier."""
        shadows = self._shadows.values()
        fast = sum(layer.nbytes for shadow in shadows for layer in shadow.layers.values())
        return {"fast": fast, "slow": sum(shadow.values.nbytes for shadow in shadows)}

    def _count_chosen(self, size: int) -> int:
        """Tokens that an output token chooses: their slots are whole blocks."""
        return -(-self.budget // size) * size

    def _count_kept(self, size: int) -> int:
        """Slots of a prompt that are for what is chosen, and after that for outliers."""
        return self._count_chosen(size) + self.outliers * CHUNK

    def _keep(self, step: LayerStep, sequence: int) -> None:
        """A prompt ends here: take its shadow, and move its outliers to where they stay."""
        cache, batch, size = step.cache, step.batch, step.cache.keys.shape[3]
        assert batch.shrinks is not None and step.rope is not None
        begin = int(batch.shrinks[sequence]) * size
        count = begin + self._count_kept(size)
        table = batch.block_tables[cache.group][sequence].long()
        keys, values = (each[:, :count] for each in read_blocks(cache, table[: -(-count // size)]))
        shadow = self._open(batch.numbers[sequence], values, cache.values.dtype)
        chunked = values.view(len(values), -1, CHUNK, values.shape[2])
        shadow.values[self._whole.index(step.layer)] = chunked.to(shadow.values)
        landmarks = keys.view(chunked.shape).mean(2)
        outliers, rest = part_outliers(keys.view(chunked.shape), landmarks, self.outliers)
        coordinates, directions = reduce_rank(keys, step.rope, self.rank)
        dtype, heads = cache.keys.dtype, torch.arange(len(keys), device=keys.device)[:, None]
        shadow.layers[step.layer] = LayerShadow(
            coordinates.to(dtype), directions.to(dtype), landmarks[heads, rest].to(dtype), rest
        )
        exact = (each.view(chunked.shape)[heads, outliers].flatten(1, 2) for each in (keys, values))
        write_slots(cache, table, begin + self._count_chosen(size), *exact)

    def _open(self, number: int, values: Tensor, dtype: torch.dtype) -> Shadow:
        """The sequence's shadow, new at its prompt's first layer. values [kv heads, N, D]."""
        heads, count, size = values.shape
        shape = (len(self._whole), heads, count // CHUNK, CHUNK, size)
        if number not in self._shadows:
            self._shadows[number] = Shadow(map_file(self.folder, prod(shape), dtype).view(shape))
        return self._shadows[number]

    def _fetch(self, step: LayerStep, sequence: int, row: int) -> None:
        """Write what a token chooses of its sequence's prompt into the slots that are for that."""
        cache, batch, size = step.cache, step.batch, step.cache.keys.shape[3]
        assert batch.begins is not None and step.rope is not None
        shadow = self._shadows[batch.numbers[sequence]]
        layer, values = shadow.layers[step.layer], shadow.values[self._whole.index(step.layer)]
        count = self._count_chosen(size)
        chunks = choose_chunks(step.queries[row], layer, count // CHUNK, step.spec.scale)
        blocks = batch.block_tables[cache.group][sequence, int(batch.begins[sequence]) // size :][: count // size]
        within = torch.arange(CHUNK, device=chunks.device)
        slots = (blocks.long()[:, None] * size + torch.arange(size, device=blocks.device)).flatten()
        for head, own in enumerate(chunks):
            tokens = (own[:, None] * CHUNK + within).flatten()
            keys = layer.coordinates[tokens] @ layer.directions[head]
            fused = torch.stack([keys, values[head, own.to(values.device)].flatten(0, 1).to(keys.device)], 1)
            rotation = step.rope[0][tokens], step.rope[1][tokens]
            step.kernels.place_heads(fused, HeadSpec(), rotation, take_head(cache, head), slots)


def part_outliers(chunks: Tensor, landmarks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which chunks of rotated keys [kv heads, n, CHUNK, D] have a key least like their landmark [kv heads, n, D], and
    which are the others: int64 [kv heads, count] and [kv heads, n - count], ascending."""
    likeness = torch.cosine_similarity(chunks, landmarks[:, :, None], dim=-1).amin(2)
    order = likeness.sort(dim=-1, stable=True).indices
    return order[:, :count].sort(-1).values, order[:, count:].sort(-1).values


def reduce_rank(keys: Tensor, rope: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Coordinates [N, rank] and directions [kv heads, rank, D] of rotated keys [kv heads, N, D], the first N of a text,
    as they were before rotation: their best approximation of this rank, or they themselves where it is full."""
    heads, count, size = keys.shape
    cos, sin = (table[:count] for table in rope)
    # A rotation may stretch as well: turn back, and divide by the stretch once for each way.
    stretch = cos.square() + sin.square()
    straight = keys.transpose(0, 1).contiguous()
    rotate(straight, cos / stretch, -sin / stretch)
    straight = straight.flatten(1)
    # The right singular vectors are the eigenvectors of a much smaller matrix.
    wide = straight.double()
    vectors = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -rank:]
    directions = vectors.T.reshape(-1, heads, size).transpose(0, 1)
    return (wide @ vectors).to(keys.dtype), directions.to(keys.dtype)


def choose_chunks(queries: Tensor, layer: LayerShadow, count: int, scale: float) -> Tensor:
    """The chunks whose landmarks queries [heads, D] attend to most, int64 [kv heads, count] ascending. A kv head's
    chunks are chosen by the largest weight that any of its queries gives them."""
    grouped = queries.float().reshape(len(layer.landmarks), -1, queries.shape[1])
    weights = (grouped @ layer.landmarks.float().transpose(1, 2) * scale).softmax(-1).amax(1)
    best = weights.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return layer.chunks.gather(1, best.sort(-1).values)
