"""A prompt that is made smaller and then rounded: `scissorhands(keep=0.5)+kivi(k=4, v=4)`.

Knows nothing of what stays of a prompt, or of how a block is sealed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from headrace.cache.layout import CacheGroup, CacheLayout
from headrace.cache.policies.base import KVShape, LayerStep, Plane
from headrace.cache.policies.sealing import arrange_sealed, seal_filled
from headrace.cache.policies.shrinking import Shrinking, clear_bias
from headrace.core import InputError
from headrace.kernels.base import LayerCache, RaggedBatch, SealedForm


class ShrinkSealed:
    """See `KVPolicy`. A prompt is exact until it is complete, and all of its queries see all of it exactly. Then what
    the shrinking policy keeps is sealed where it was moved to, and so is each block of output once it is full.

    A head's kept tokens are each other's neighbours in a block, so scales of keys are those of whatever tokens stayed.
    What a policy adds to their scores stays a number beside them.
    """

    def __init__(self, policy: Shrinking, form: SealedForm, residual: int) -> None:
        """Raises InputError for a policy whose tokens go again and again."""
        if policy.shrink.every:
            raise InputError(
                f"kv {policy.name}: what stays is sealed, and with every it would be rounded anew each time; "
                "leave out every or kivi"
            )
        self.policy = policy
        self.form = form
        self.residual = residual

    @property
    def planes(self) -> tuple[Plane, ...]:
        return self.policy.planes

    def arrange(self, shape: KVShape, block_size: int) -> CacheLayout:
        # It may refuse the model; how it would lie in memory alone is not asked.
        self.policy.arrange(shape, block_size)
        sealed_bytes = shape.kv_heads * self.form.count_head_bytes(shape.head_size, block_size)
        if "bias" in self.planes:
            sealed_bytes += 4 * shape.kv_heads * block_size
        exact_bytes = shape.count_layer_bytes(block_size, len(self.planes))
        exact = CacheGroup((), self.residual, exact_bytes, keeps_prompts=True)
        layout = arrange_sealed(shape, block_size, sealed_bytes, exact)
        return replace(layout, shares_prefixes=False, shrink=self.policy.shrink)

    def attend(self, step: LayerStep) -> Tensor:
        if step.cache.sealed is None:
            return self.policy.attend(step)
        batch = step.batch
        prompts = batch.context_lengths if batch.prompts is None else batch.prompts
        reading = batch.context_lengths <= prompts
        if bool(reading.all()):
            return self._attend_prompts(step)
        if not bool(reading.any()):
            return self._attend_outputs(step)
        output = torch.empty(step.queries.shape, dtype=step.queries.dtype, device=step.queries.device)
        for chosen, attend in ((reading, self._attend_prompts), (~reading, self._attend_outputs)):
            rows, part = take_sequences(batch, chosen.nonzero().flatten(), step.cache.keys.shape[3])
            output[rows] = attend(replace(step, queries=step.queries[rows], batch=part))
        return output

    def _attend_prompts(self, step: LayerStep) -> Tensor:
        """Attention of prompts, all of it exact; those that are complete are made smaller and sealed."""
        cache, batch = step.cache, step.batch
        output = self.policy.attend(replace(step, cache=replace(cache, sealed=None)))
        contexts = batch.context_lengths.tolist()
        prompts = contexts if batch.prompts is None else batch.prompts.tolist()
        dropped = [0] * len(contexts) if batch.shrinks is None else batch.shrinks.tolist()
        for sequence, (context, prompt) in enumerate(zip(contexts, prompts, strict=True)):
            if context == prompt >= cache.keys.shape[3]:
                whole = slice(dropped[sequence], prompt // cache.keys.shape[3])
                exact, sealed = (
                    batch.block_tables[group][sequence, whole] for group in (cache.group, cache.sealed_group)
                )
                step.kernels.seal(cache, exact.contiguous(), sealed.contiguous())
                copy_bias(cache, exact, sealed)
        return output

    def _attend_outputs(self, step: LayerStep) -> Tensor:
        cache, filled = step.cache, step.batch.filled
        clear_bias(cache, step.batch)
        seal_filled(step)
        copy_bias(cache, filled[cache.group], filled[cache.sealed_group])
        return step.kernels.attention(step.queries, cache, step.batch, step.spec)


def copy_bias(cache: LayerCache, exact: Tensor, sealed: Tensor) -> None:
    """Where scores have one, that of exact blocks goes to the blocks that they are sealed in."""
    if cache.bias is not None and cache.sealed_bias is not None:
        cache.sealed_bias[sealed.long()] = cache.bias[exact.long()]


def take_sequences(batch: RaggedBatch, chosen: Tensor, block_size: int) -> tuple[Tensor, RaggedBatch]:
    """The rows of some sequences (int64 [n], ascending) of a batch, and the batch of them alone, without logits."""
    lengths = batch.query_starts.diff().long()
    owners = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    rows = torch.isin(owners, chosen).nonzero().flatten()
    positions, tables = batch.positions[rows], tuple(table[chosen] for table in batch.block_tables)
    starts = torch.zeros(len(chosen) + 1, dtype=torch.int32, device=lengths.device)
    starts[1:] = lengths[chosen].cumsum(0)
    own = torch.repeat_interleave(torch.arange(len(chosen), device=lengths.device), lengths[chosen])
    last = (positions % block_size == block_size - 1).nonzero().flatten()
    part = replace(
        batch,
        token_ids=batch.token_ids[rows],
        positions=positions,
        query_starts=starts,
        context_lengths=batch.context_lengths[chosen],
        block_tables=tables,
        slots=tuple(slots[rows] for slots in batch.slots),
        logit_rows=batch.logit_rows[:0],
        filled=tuple(table[own[last], (positions[last] // block_size).long()] for table in tables),
        begins=None if batch.begins is None else batch.begins[chosen],
        shrinks=None if batch.shrinks is None else batch.shrinks[chosen],
        observed=None if batch.observed is None else batch.observed[chosen],
        prompts=None if batch.prompts is None else batch.prompts[chosen],
        numbers=tuple(batch.numbers[index] for index in chosen.tolist()),
    )
    return rows, part
