"""Drive a model without an engine: hand-built ragged batches over a cache whose blocks are handed out at random."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from headrace.cache.paged import PagedCache
from headrace.cache.policies.choice import make_policy
from headrace.core import Chunk, Request, SamplingParams, Sequence
from headrace.engine.batch import build_batch
from headrace.model import Model


class RaggedDriver:
    """Feeds chunks of token sequences to a model and returns the logits of every token of the chunks."""

    def __init__(self, model: Model, blocks: int = 400, seed: int = 0, block_size: int = 16, kv: str = "plain") -> None:
        self.model = model
        self.cache = PagedCache(model.kv_shape, make_policy(kv), block_size, blocks, "cpu")
        self.free = random.Random(seed).sample(range(blocks), blocks)
        self.sequences: list[Sequence] = []

    def add(self, tokens: list[int]) -> int:
        """A new sequence; its number."""
        number = len(self.sequences)
        tables: list[list[int]] = [[] for _ in self.cache.layout.groups]
        # A scored request asks for logits of all its tokens but the last: one token more makes that all of ours.
        request = Request(str(number), tuple(tokens), SamplingParams(), score=True)
        self.sequences.append(Sequence(request, 0, number, [*tokens, 0], tables=tables))
        return number

    def run(self, lengths: dict[int, int]) -> dict[int, Tensor]:
        """Compute so many more tokens of each sequence in one batch: logits [length, V] by sequence."""
        layout = self.cache.layout
        size = layout.block_size
        scheduled = []
        for number, length in lengths.items():
            sequence = self.sequences[number]
            for table in sequence.tables:
                while len(table) * size < sequence.computed + length:
                    table.append(self.free.pop())
            scheduled.append((Chunk(number, sequence.computed, length), sequence))
        logits = self.model.logits(self.model.forward(build_batch(scheduled, layout, "cpu"), self.cache))
        borders = np.cumsum([0, *lengths.values()])
        for number, length in lengths.items():
            self.sequences[number].computed += length
        pieces = (logits[start:end] for start, end in pairwise(borders))
        return dict(zip(lengths, pieces, strict=True))

    def slide(self, number: int) -> None:
        """Take blocks that no later query of a windowed group can see away from the sequence, and spoil them."""
        sequence, size = self.sequences[number], self.cache.layout.block_size
        for group, table in zip(self.cache.layout.groups, sequence.tables, strict=True):
            if group.window is None:
                continue
            for place in range(group.first // size, max(0, sequence.computed - group.window + 1) // size):
                if table[place] >= 0:
                    # All bits set are not a number in either dtype.
                    self.cache.arena[table[place]] = 255
                    table[place] = -1


def logits_of(model: Model, tokens: list[int], chunks: list[int]) -> Tensor:
    """Logits [T, V] of a text computed in chunks of these lengths."""
    driver = RaggedDriver(model)
    number = driver.add(tokens)
    return torch.cat([driver.run({number: length})[number] for length in chunks])
