"""What policies that read a part of the cache have in common. Knows nothing of how the part is chosen."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headrace.core import InputError
from headrace.kernels.base import RaggedBatch


@dataclass(frozen=True, slots=True)
class Parted:
    """A batch in which some tokens, the last ones of their chunks, are sequences of their own: each reads its own part.

    batch      with query_starts and context_lengths of the parts; all else in it is as it was
    sequences  int64 [parts], whose tokens a part has, as an index into the batch that it was
    alone      int64 [R], the parts that are one such token
    """

    batch: RaggedBatch
    sequences: Tensor
    alone: Tensor


def find_owners(batch: RaggedBatch) -> Tensor:
    """int64 [T]: the sequence of each token."""
    lengths = batch.query_starts.diff().long()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


def find_outputs(batch: RaggedBatch, owners: Tensor) -> Tensor:
    """bool [T]: which tokens are not of a prompt."""
    if batch.prompts is None:
        return torch.zeros_like(owners, dtype=torch.bool)
    return batch.positions >= batch.prompts[owners]


def part(batch: RaggedBatch, owners: Tensor, alone: Tensor) -> Parted:
    """Make tokens, bool [T], the last of their chunks, sequences of their own."""
    begins = alone.clone()
    begins[batch.query_starts[:-1].long()] = True
    starts = begins.nonzero().flatten()
    query_starts = torch.cat([starts, starts.new_tensor([len(alone)])])
    contexts = batch.positions[query_starts[1:] - 1] + 1
    parted = replace(batch, query_starts=query_starts.int(), context_lengths=contexts)
    return Parted(parted, owners[starts], alone[starts].nonzero().flatten())


def take_token(batch: RaggedBatch, sequence: int, row: int) -> RaggedBatch:
    """One token of a sequence as a batch of its own, to be read with: it writes nothing and wants no logits."""
    own = slice(sequence, sequence + 1)
    return replace(
        batch,
        positions=batch.positions[row : row + 1],
        query_starts=torch.tensor([0, 1], dtype=torch.int32, device=batch.positions.device),
        context_lengths=batch.positions[row : row + 1] + 1,
        block_tables=tuple(table[own] for table in batch.block_tables),
        begins=None if batch.begins is None else batch.begins[own],
    )


def map_file(folder: str, count: int, dtype: torch.dtype) -> Tensor:
    """So many numbers in a file of that folder ("": the system's temporary one) that is gone when they are.

    Raises InputError where there is no room for it.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder or None, prefix="headrace-") as file:
            # Room is taken at once: memory of a file on a full disk could not say that it is full.
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype)
    except OSError as error:
        place = folder or tempfile.gettempdir()
        raise InputError(f"kv: {count * dtype.itemsize} bytes of values cannot be kept in {place}: {error}") from None
