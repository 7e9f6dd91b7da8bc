"""From a step plan to the ragged batch that the model computes."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from itertools import accumulate, takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.cache.layout import CacheLayout
from headrace.core import Chunk, Sequence
from headrace.kernels.base import RaggedBatch
from headrace.meter.operations import Piece


def build_batch(scheduled: Rows[tuple[Chunk, Sequence]], block_size: int, device: str) -> RaggedBatch:
    """Lay the chunks' tokens end to end, in the plan's order.

    Logits are wanted for the last token of a chunk that reaches the end of what is known, and for every token of a
    request that is scored. Reads the sequences and their block tables, changes nothing.
    """
    tokens: list[int] = []
    logit_rows: list[int] = []
    for chunk, sequence in scheduled:
        logit_rows.extend(row + len(tokens) for row in wanted_rows(chunk, sequence))
        tokens.extend(sequence.tokens[chunk.start : chunk.start + chunk.length])
    starts = np.array([chunk.start for chunk, _ in scheduled], dtype=np.int32)
    lengths = np.array([chunk.length for chunk, _ in scheduled], dtype=np.int32)
    query_starts = np.array([0, *accumulate(chunk.length for chunk, _ in scheduled)], dtype=np.int32)
    owner = np.repeat(np.arange(len(scheduled)), lengths)
    positions = np.arange(len(tokens), dtype=np.int32) + (starts - query_starts[:-1])[owner]
    tables = [block_table([sequence.tables[group] for _, sequence in scheduled]) for group in groups(scheduled)]
    slots = [table[owner, positions // block_size].astype(np.int64) * block_size for table in tables]

    def send(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return RaggedBatch(
        token_ids=send(np.array(tokens, dtype=np.int64)),
        positions=send(positions),
        query_starts=send(query_starts),
        context_lengths=send(starts + lengths),
        block_tables=tuple(send(table) for table in tables),
        slots=tuple(send(slot + positions % block_size) for slot in slots),
        logit_rows=send(np.array(logit_rows, dtype=np.int64)),
    )


def describe_pieces(scheduled: Rows[tuple[Chunk, Sequence]], layout: CacheLayout, references: list[int]) -> list[Piece]:
    """What the meter counts of a step, before the step changes the sequences. references: holders of each block."""
    whole = next((index for index, group in enumerate(layout.groups) if group.window is None), None)
    read: set[int] = set()
    pieces = []
    for chunk, sequence in scheduled:
        blocks = [] if whole is None else sequence.tables[whole][: chunk.start // layout.block_size]
        held = list(takewhile(lambda block: references[block] > 1, blocks))
        shared = sum(1 for block in held if block in read) * layout.block_size
        read.update(held)
        output = chunk.start >= sequence.prompt_length
        pieces.append(Piece(chunk.start, chunk.length, len(wanted_rows(chunk, sequence)), output, shared))
    return pieces


def wanted_rows(chunk: Chunk, sequence: Sequence) -> range:
    """The chunk's tokens, counted from its start, whose logits are wanted."""
    if sequence.request.score:
        return range(min(chunk.length, len(sequence.tokens) - 1 - chunk.start))
    reaches_end = chunk.start + chunk.length == len(sequence.tokens)
    return range(chunk.length - 1, chunk.length) if reaches_end else range(0)


def groups(scheduled: Rows[tuple[Chunk, Sequence]]) -> range:
    """Indices of the cache groups; every sequence has a table for each."""
    return range(len(scheduled[0][1].tables))


def block_table(rows: list[list[int]]) -> NDArray[np.int32]:
    """Rows of block ids as one array [S, longest row], -1 on the right of short rows."""
    table = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table
