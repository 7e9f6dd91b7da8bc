"""From a step plan to the ragged batch that the model computes."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.cache.layout import CacheLayout
from headrace.core import Chunk, Sequence
from headrace.kernels.base import RaggedBatch
from headrace.schedule.pieces import count_shrinking, find_observed, wanted_rows


def build_batch(scheduled: Rows[tuple[Chunk, Sequence]], layout: CacheLayout, device: str) -> RaggedBatch:
    """Lay the chunks' tokens end to end, in the plan's order.

    Logits are wanted for the last token of a chunk that reaches the end of what is known, and for every token of a
    request that is scored. Reads the sequences and their block tables, changes nothing.
    """
    block_size = layout.block_size
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
    last = np.flatnonzero(positions % block_size == block_size - 1)
    filled = [np.ascontiguousarray(table[owner[last], positions[last] // block_size]) for table in tables]
    dropped = np.array([sequence.dropped for _, sequence in scheduled], dtype=np.int32)
    prompts = np.array([sequence.prompt_length for _, sequence in scheduled], dtype=np.int32)
    shrinks = np.array([count_shrinking(chunk, sequence, layout) for chunk, sequence in scheduled], dtype=np.int32)
    observed = np.array([find_observed(chunk, sequence, layout) for chunk, sequence in scheduled], dtype=np.int32)

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
        filled=tuple(send(blocks) for blocks in filled),
        begins=send(dropped * block_size) if dropped.any() else None,
        shrinks=send(shrinks) if shrinks.any() else None,
        observed=send(observed) if (observed >= 0).any() else None,
        prompts=send(prompts),
        numbers=tuple(sequence.number for _, sequence in scheduled),
    )


def groups(scheduled: Rows[tuple[Chunk, Sequence]]) -> range:
    """Indices of the cache groups; every sequence has a table for each."""
    return range(len(scheduled[0][1].tables))


def block_table(rows: list[list[int]]) -> NDArray[np.int32]:
    """Rows of block ids as one array [S, longest row], -1 on the right of short rows."""
    table = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table
