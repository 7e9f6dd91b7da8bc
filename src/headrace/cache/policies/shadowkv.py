"""ShadowKV (arXiv 2410.21465): a prompt's keys as a product of small matrices, its values on a slower tier.

As in section 4 of the paper: while a prompt is computed all is exact. At its end the keys before rotation are brought
to a low rank, the means of 8 rotated keys each become landmarks, the chunks that their landmark tells least about stay
exact, and so do the newest tokens. An output token chooses chunks by their landmarks; their keys are made again, their
values fetched. Here what it chose is written into blocks that the prompt keeps, so that the ordinary kernels read it
together with the rest, in a loop over sequences; nothing is fetched while something else is computed.

All of it that is in memory is in blocks that the prompt keeps, as rows of one head's size each:

    dropped | landmarks, directions, coordinates, and values that are in memory | chosen | outliers, newest tokens
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from headrace.cache.layout import CacheLayout, Shrink, Summary
from headrace.cache.policies.base import KVShape, LayerStep, Plane
from headrace.cache.policies.parameters import check_choice, check_number, check_text
from headrace.cache.policies.selecting import find_folder, map_file, take_token
from headrace.core import InputError
from headrace.kernels.base import LayerCache, RaggedBatch, SealedForm
from headrace.kernels.contexts import read_blocks, write_slots
from headrace.kernels.reference import rotate
from headrace.kernels.shadows import CHUNK, BlockRows, ShadowRows, count_place_rows, count_rows


@dataclass(frozen=True, slots=True)
class Shadow:
    """A prompt's first n chunks: what stands for them is in blocks `begin` to `end` of its tables. values [layers, kv
    heads, n, CHUNK, D] are those in a file, None where they are in the blocks too."""

    begin: int
    end: int
    chunks: int
    values: Tensor | None


class ShadowKV:
    """See `KVPolicy`. Layers with sliding windows stay as they are."""

    form: SealedForm | None = None
    residual = 1
    planes: tuple[Plane, ...] = ()

    def __init__(
        self,
        rank: int = 96,
        budget: int = 128,
        outliers: int = 3,
        local: int = 32,
        slow: Literal["file", "memory"] = "file",
        folder: str = "",
    ) -> None:
        """rank: of the keys of all heads of a layer together. budget: prompt tokens that an output token chooses, each
        kv head its own, rounded up to whole blocks. outliers: chunks of 8 tokens that stay exact. local: the least of
        a prompt's newest tokens that stay exact. slow: where values are. folder: of their files; "" for the system's
        temporary one."""
        for name, value, low in (
            ("rank", rank, 1),
            ("budget", budget, 1),
            ("outliers", outliers, 0),
            ("local", local, 1),
        ):
            check_number("shadowkv", name, value, low, 1 << 20)
        check_choice("shadowkv", "slow", slow, ("file", "memory"))
        check_text("shadowkv", "folder", folder)
        if folder and slow != "file":
            raise InputError("kv shadowkv: folder is for values in files; leave it out, or slow='memory'")
        self.rank, self.budget, self.outliers, self.local = rank, budget, outliers, local
        self.folder = find_folder(folder) if slow == "file" else None
        self._whole: list[int] = []
        self._summary = Summary(0, 0, 1)
        self._shadows: dict[int, Shadow] = {}

    def arrange(self, shape: KVShape, block_size: int) -> CacheLayout:
        self._whole = [layer for layer, window in enumerate(shape.windows) if window is None]
        if not self._whole:
            raise InputError("every layer of this model has a sliding window: there is nothing to shrink; use kv plain")
        exact = shape.count_layer_bytes(block_size)
        self._summary = self._summarise(shape, block_size)
        if self._summary.token_bytes * block_size >= exact:
            raise InputError(
                f"kv shadowkv: keys of rank {self.rank} and values in memory take no less than plain keys and values: "
                "lower the rank, or leave out slow='memory'"
            )
        layout = CacheLayout.from_windows(shape.windows, block_size, exact)
        kept = self._count_kept(block_size) + self.local
        return replace(layout, shares_prefixes=False, shrink=Shrink(kept, summary=self._summary))

    def attend(self, step: LayerStep) -> Tensor:
        batch = step.batch
        if step.spec.window is not None:
            return step.kernels.attention(step.queries, step.cache, replace(batch, begins=None), step.spec)
        batch, starts, long = self._skip(batch, step.cache), batch.query_starts.tolist(), []
        for sequence in () if batch.begins is None else batch.begins.nonzero().flatten().tolist():
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

    def count_bytes(self) -> int:
        """Bytes of values that are in files now."""
        return sum(shadow.values.nbytes for shadow in self._shadows.values() if shadow.values is not None)

    def _summarise(self, shape: KVShape, block_size: int) -> Summary:
        """Bytes that `ShadowRows` take in a layer; N tokens that have a shadow are no more than the prompt has."""
        heads, size = shape.kv_heads, shape.head_size
        rank = min(self.rank, heads * size)
        rows = heads + count_rows(rank, size) + (CHUNK * heads if self.folder is None else 0)
        row_bytes = size * shape.dtype.itemsize
        places = count_place_rows(heads * self._count_chosen(block_size) // CHUNK, row_bytes)
        sequence_bytes = (places + heads * rank) * row_bytes
        return Summary(-(-rows * row_bytes // CHUNK), sequence_bytes, shape.count_layer_bytes(block_size))

    def _count_chosen(self, size: int) -> int:
        """Tokens that an output token chooses: their slots are whole blocks."""
        return -(-self.budget // size) * size

    def _count_kept(self, size: int) -> int:
        """Slots of a prompt that are for what is chosen, and after that for outliers."""
        return self._count_chosen(size) + self.outliers * CHUNK

    def _skip(self, batch: RaggedBatch, cache: LayerCache) -> RaggedBatch:
        """The batch for kernels: what they read of a sequence begins after its shadow."""
        if batch.begins is None:
            return batch
        begins = batch.begins.clone()
        for sequence in begins.nonzero().flatten().tolist():
            begins[sequence] = self._shadows[batch.numbers[sequence]].end * cache.keys.shape[3]
        return replace(batch, begins=begins)

    def _keep(self, step: LayerStep, sequence: int) -> None:
        """A prompt ends here: take its shadow, and move its outliers to where they stay."""
        cache, batch, size = step.cache, step.batch, step.cache.keys.shape[3]
        assert batch.shrinks is not None and step.rope is not None
        shadow = self._open(batch, sequence, cache)
        count, table = shadow.chunks * CHUNK, batch.block_tables[cache.group][sequence].long()
        keys, values = (each[:, :count] for each in read_blocks(cache, table[: -(-count // size)]))
        chunked = [each.view(len(each), -1, CHUNK, each.shape[2]) for each in (keys, values)]
        landmarks, heads = chunked[0].mean(2), torch.arange(len(keys), device=keys.device)[:, None]
        outliers = find_outliers(chunked[0], landmarks, self.outliers)
        coordinates, directions = reduce_rank(keys, step.rope, self.rank)
        landmarks[heads, outliers, 0] = torch.finfo(cache.keys.dtype).max
        rows = self._view(cache, table, shadow, step.layer)
        rows.write(landmarks, directions, coordinates, chunked[1] if rows.values is None else None)
        if rows.values is not None:
            rows.values.copy_(chunked[1])
        exact = (each[heads, outliers].flatten(1, 2) for each in chunked)
        write_slots(cache, table, shadow.end * size + self._count_chosen(size), *exact)

    def _open(self, batch: RaggedBatch, sequence: int, cache: LayerCache) -> Shadow:
        """The sequence's shadow, new at its prompt's first layer."""
        number = batch.numbers[sequence]
        if number not in self._shadows:
            _, heads, _, size, _ = cache.keys.shape
            begin = int(batch.shrinks[sequence])  # type: ignore[index]
            end = begin + self._summary.count_blocks(int(batch.context_lengths[sequence]))
            chunks = (end * size + self._count_kept(size)) // CHUNK
            values, shape = None, (len(self._whole), heads, chunks, CHUNK, cache.values.shape[3])
            if self.folder is not None:
                values = map_file(self.folder, prod(shape), cache.values.dtype).view(shape)
            self._shadows[number] = Shadow(begin, end, chunks, values)
        return self._shadows[number]

    def _view(self, cache: LayerCache, table: Tensor, shadow: Shadow, layer: int) -> ShadowRows:
        """The layer's part of a shadow."""
        count = self._count_chosen(cache.keys.shape[3]) // CHUNK
        heads, rows = cache.keys.shape[1], BlockRows.view(cache.keys, cache.values, table[shadow.begin : shadow.end])
        values = None if shadow.values is None else shadow.values[self._whole.index(layer)]
        return ShadowRows(rows, heads, shadow.chunks, count, min(self.rank, heads * cache.values.shape[3]), values)

    def _fetch(self, step: LayerStep, sequence: int, row: int) -> None:
        """Write what a token chooses of its sequence's prompt into the slots that are for that."""
        cache, batch = step.cache, step.batch
        assert step.rope is not None
        shadow, table = self._shadows[batch.numbers[sequence]], batch.block_tables[cache.group][sequence]
        rows = self._view(cache, table, shadow, step.layer)
        into = table[shadow.end : shadow.end + rows.count * CHUNK // cache.keys.shape[3]]
        step.kernels.recall(step.queries[row : row + 1], cache, rows, into, step.rope, step.spec.scale)


def find_outliers(chunks: Tensor, landmarks: Tensor, count: int) -> Tensor:
    """Which chunks of rotated keys [kv heads, n, CHUNK, D] have a key least like their landmark [kv heads, n, D]: int64
    [kv heads, count], ascending."""
    likeness = torch.cosine_similarity(chunks, landmarks[:, :, None], dim=-1).amin(2)
    return likeness.sort(dim=-1, stable=True).indices[:, :count].sort(-1).values


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
