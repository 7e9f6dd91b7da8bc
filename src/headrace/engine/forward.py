"""Hidden states of a text from a model alone: no schedule, no requests. What judges of quality compare."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.cache.paged import PagedCache
from headrace.cache.policies.plain import Plain
from headrace.core import Chunk, Request, SamplingParams, Sequence
from headrace.engine.batch import build_batch
from headrace.model import Model


@torch.inference_mode()
def compute_hidden(model: Model, texts: list[list[int]], block_size: int = 32) -> Tensor:
    """Hidden states [sum of lengths, hidden] of every token of some texts, computed in one batch.

    The cache is made for this call: texts should be few and no longer than the context.
    """
    counts = [-(-len(text) // block_size) for text in texts]
    groups = len(Plain().arrange(model.kv_shape, block_size).groups)
    cache = PagedCache(model.kv_shape, Plain(), block_size, groups * sum(counts), str(model.embedding.device))
    blocks = iter(range(groups * sum(counts)))
    scheduled = []
    for number, (text, count) in enumerate(zip(texts, counts, strict=True)):
        # A scored request wants all its tokens but the last: one more makes that all of the text.
        request = Request(str(number), tuple(text), SamplingParams(), score=True)
        tables = [[next(blocks) for _ in range(count)] for _ in range(groups)]
        sequence = Sequence(request, 0, number, [*text, 0], tables=tables)
        scheduled.append((Chunk(number, 0, len(text)), sequence))
    return model.forward(build_batch(scheduled, cache.layout, cache.device), cache)
