"""Hidden states of texts that are known already: nothing is sampled. What judges of quality compare."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import replace

import torch
from torch import Tensor

from headrace.cache.paged import PagedCache
from headrace.cache.policies.base import KVPolicy
from headrace.cache.policies.plain import Plain
from headrace.core import Chunk, Request, SamplingParams, Sequence
from headrace.engine.batch import build_batch
from headrace.engine.caching import open_cache
from headrace.model import Model
from headrace.options import EngineOptions
from headrace.schedule.apply import advance, apply, finish
from headrace.schedule.step import plan_step


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


class AnswerReader:
    """Reads known answers to prompts through a cache of one policy, with the chunks that an engine would compute.

    The cache is the reader's own, for one prompt and its answer at a time, of at most `tokens` together.
    """

    def __init__(self, model: Model, policy: KVPolicy, options: EngineOptions, tokens: int) -> None:
        """options: block_size and step_tokens count. Raises InputError where the policy cannot serve the model."""
        blocks = policy.arrange(model.kv_shape, options.block_size).count_blocks(tokens)
        self.model = model
        # Every token of an answer is to be read: none may come from an equal text.
        self.cache, self.state = open_cache(model, policy, replace(options, prefix_cache=False), blocks)
        self._read = 0

    @torch.inference_mode()
    def read(self, prompt: Rows[int], answer: Rows[int]) -> Tensor:
        """Hidden states [len(answer), hidden], each one that from which a token of the answer is to be predicted."""
        request = Request(str(self._read), tuple(prompt), SamplingParams(max_tokens=len(answer)))
        sequence = Sequence(request, 0, self._read, [*prompt, *answer[:-1]])
        self._read += 1
        self.state.add(sequence)
        hidden = []
        while sequence.computed < len(sequence.tokens):
            plan = plan_step(self.state, self.state.limits)
            apply(plan, self.state)
            batch = build_batch([(chunk, sequence) for chunk in plan.chunks], self.cache.layout, self.cache.device)
            wanted = torch.nonzero(batch.positions >= len(prompt) - 1).flatten()
            hidden.append(self.model.forward(replace(batch, logit_rows=wanted), self.cache))
            advance(plan, self.state)
        finish(sequence, self.state)
        return torch.cat(hidden)
