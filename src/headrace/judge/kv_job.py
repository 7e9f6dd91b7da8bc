"""Tokens a second of a small job under a KV policy: the engine itself, over a model that is loaded already."""

from __future__ import annotations

import time
from dataclasses import replace

from headrace.cache.paged import PagedCache
from headrace.cache.policies.choice import make_policy
from headrace.checkpoint import Tokenizer
from headrace.core import Request, SamplingParams
from headrace.engine.engine import Engine
from headrace.engine.loading import size_cache
from headrace.model import Model
from headrace.options import EngineOptions
from headrace.schedule.choice import SCHEDULES
from headrace.schedule.state import SchedulerState


def measure_job(
    model: Model, tokenizer: Tokenizer, options: EngineOptions, kv: str, prompts: list[list[int]], outputs: int
) -> float:
    """Prompt and output tokens a second, each prompt continued by `outputs` tokens, in options.kv_cache_bytes.

    Raises RowError for a prompt that this memory does not hold.
    """
    options = replace(options, kv=kv)
    policy = make_policy(kv)
    blocks, layout = size_cache(model.kv_shape, policy, options)
    cache = PagedCache(model.kv_shape, policy, options.block_size, blocks, options.device)
    state = SchedulerState.create(layout, blocks, options, model.config.context_length)
    engine = Engine(model, tokenizer, cache, state, SCHEDULES[options.schedule]())
    params = SamplingParams(max_tokens=outputs, ignore_eos=True)
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), tuple(prompt), params))
    while engine.unfinished:
        engine.step()
    seconds = time.perf_counter() - began
    counters = engine.counters
    return (counters.prompt_tokens + counters.output_tokens) / seconds
