"""What policies that read a part of the cache have in common. Knows nothing of how the part is chosen."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from headrace.core import HeadraceError, InputError
from headrace.kernels.base import RaggedBatch

# File systems whose files are memory.
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")


class NoRoom(HeadraceError):
    """The disk has no room for what a step must keep there. Says how much, where, and what to do."""

    exit_code = 3


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


def find_folder(folder: str) -> str:
    """The folder for files that spare memory: the one that is named, or ("") the system's temporary one on a disk.

    Raises InputError for one that is not there, and for one whose files are memory themselves.
    """
    if folder and not Path(folder).is_dir():
        raise InputError(f"kv: folder {folder!r} is no folder")
    choices = [folder] if folder else [tempfile.gettempdir(), "/var/tmp"]
    for each in choices:
        if Path(each).is_dir() and not lies_in_memory(each):
            return each
    raise InputError(
        f"kv: files in {' and '.join(choices)} are memory themselves: name a folder on a disk, as in "
        "shadowkv(folder='/data'), or count them as memory with shadowkv(slow='memory')"
    )


def lies_in_memory(folder: str) -> bool:
    """Whether a folder's file system has no disk; one that the system says nothing of is taken to have one."""
    device = os.stat(folder).st_dev
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False  # no /proc on this system
    for mount in mounts:
        place, _, kind = mount.partition(" - ")
        if place.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return kind.split()[0] in IN_MEMORY
    return False


def map_file(folder: str, count: int, dtype: torch.dtype) -> Tensor:
    """So many numbers in a file of that folder that is gone when they are. Raises NoRoom where they do not fit."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="headrace-") as file:
            # Room is taken at once: memory of a file on a full disk could not say that it is full.
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype)
    except OSError as error:
        raise NoRoom(
            f"kv: {count * dtype.itemsize:,} bytes of a prompt's values cannot be kept in {folder}: "
            f"{error.strerror or error}. Make room there; a job goes on after the rows that it had finished when the "
            "same command is run again. With another folder or slow='memory' it begins anew"
        ) from None
