"""Tokens a second of a small job under a KV policy: the engine itself, over a model that is loaded already."""

from __future__ import annotations

import time

from headrace.cache.policies.choice import make_policy
from headrace.checkpoint import Tokenizer
from headrace.core import Request, SamplingParams
from headrace.engine.caching import open_cache
from headrace.engine.engine import Engine
from headrace.engine.planner import Planner
from headrace.model import Model
from headrace.options import EngineOptions
from headrace.schedule.choice import SCHEDULES


def make_prompts(contexts: list[list[int]], count: int) -> list[list[int]]:
    """So many prompts of the contexts' tokens, no two of which begin alike: each context, then each turned by a token,
    and so on."""
    turned = (divmod(place, len(contexts)) for place in range(max(count, len(contexts))))
    return [contexts[place][turn:] + contexts[place][:turn] for turn, place in turned]


def measure_job(
    model: Model, tokenizer: Tokenizer, options: EngineOptions, kv: str, prompts: list[list[int]], outputs: int
) -> float | None:
    """Prompt and output tokens a second, each prompt continued by `outputs` tokens, in options.kv_cache_bytes; None
    where this memory does not hold one of them."""
    layout, longest = make_policy(kv).arrange(model.kv_shape, options.block_size), max(map(len, prompts))
    needed = layout.blocks_for(longest + outputs, prompt=longest) * layout.block_bytes
    if options.kv_cache_bytes is not None and options.kv_cache_bytes < needed:
        return None
    cache, state = open_cache(model, make_policy(kv), options)
    engine = Engine(model, tokenizer, cache, state, Planner(SCHEDULES[options.schedule]()))
    params = SamplingParams(max_tokens=outputs, ignore_eos=True)
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), tuple(prompt), params))
    while engine.unfinished:
        engine.step()
    seconds = time.perf_counter() - began
    counters = engine.counters
    return (counters.prompt_tokens + counters.output_tokens) / seconds
