"""A KV cache and the scheduler's state over it, made together: whoever computes needs both."""

from __future__ import annotations

from headrace.cache.layout import CacheLayout
from headrace.cache.paged import PagedCache
from headrace.cache.policies.base import KVPolicy, KVShape, Remembering
from headrace.core import InputError
from headrace.engine.memory import read_available_bytes
from headrace.model import Model
from headrace.options import EngineOptions
from headrace.schedule.state import SchedulerState


def open_cache(
    model: Model, policy: KVPolicy, options: EngineOptions, num_blocks: int | None = None
) -> tuple[PagedCache, SchedulerState]:
    """An empty cache of so many blocks, None for as many as the budget holds, and an empty state over it.

    options.kv does not count: the policy does. Raises InputError where it cannot serve the model, or no block fits.
    """
    if num_blocks is None:
        num_blocks, _ = size_cache(model.kv_shape, policy, options)
    cache = PagedCache(model.kv_shape, policy, options.block_size, num_blocks, str(model.embedding.device))
    state = SchedulerState.create(cache.layout, num_blocks, options, model.config.context_length)
    if isinstance(policy, Remembering):
        state.ledger.on_release = policy.release
    return cache, state


def size_cache(shape: KVShape, policy: KVPolicy, options: EngineOptions) -> tuple[int, CacheLayout]:
    """Blocks that the KV budget holds, and their layout.

    Raises InputError if it holds none, where the policy cannot serve the model, and where kv_dir could keep nothing.
    """
    layout = policy.arrange(shape, options.block_size)
    if options.kv_dir is not None and not (options.prefix_cache and layout.shares_prefixes):
        reason = "prefix_cache is off" if layout.shares_prefixes else f"with kv {options.kv} no prefixes are shared"
        raise InputError(f"kv_dir keeps prefixes and {reason}: leave kv_dir out, or change that")
    budget = options.kv_cache_bytes or int(read_available_bytes() * options.kv_memory_share)
    num_blocks = budget // layout.block_bytes
    if num_blocks < 1:
        raise InputError(
            f"kv_cache_bytes of {budget} holds no KV block: one block of this model takes {layout.block_bytes} bytes"
        )
    return num_blocks, layout
