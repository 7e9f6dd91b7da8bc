"""From options to an engine that is ready to run: checkpoint, kernels, model, KV cache, schedule."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from headrace.cache.paged import PagedCache, block_bytes
from headrace.checkpoint import Tokenizer, name_model, open_checkpoint
from headrace.core import InputError
from headrace.engine.engine import Engine
from headrace.engine.memory import read_available_bytes
from headrace.kernels import choose_kernels
from headrace.model import Model, ModelSettings, load_model
from headrace.options import EngineOptions
from headrace.schedule.fcfs import FirstComeFirstServed
from headrace.schedule.state import SchedulerState

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine and what it was made from. `resolved` holds every setting as it was chosen, and versions."""

    engine: Engine
    tokenizer: Tokenizer
    model_name: str
    model_hash: str
    resolved: dict[str, Any]


def load_engine(options: EngineOptions) -> LoadedEngine:
    """Load the model and give it a KV cache within the budget.

    Raises ModelError for a model that cannot be used, InputError for settings that cannot work here.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    kernels = choose_kernels(options.kernels, options.device)
    precision = choose_precision(options)
    checkpoint = open_checkpoint(options.model)
    settings = ModelSettings(
        precision=precision, device=options.device, block_size=options.block_size, max_context=options.max_context
    )
    model = load_model(checkpoint, kernels, settings)
    cache = make_cache(model, options, DTYPES[precision])
    context = model.config.context_length
    state = SchedulerState.create(cache.layout, cache.num_blocks, options, context, cache.block_bytes)
    tokenizer = checkpoint.tokenizer()
    engine = Engine(model, tokenizer, cache, state, FirstComeFirstServed(), options.seed)
    resolved = asdict(options) | {
        "precision": precision,
        "kernels": kernels.name,
        "threads": torch.get_num_threads(),
        "kv_cache_bytes": cache.num_blocks * cache.block_bytes,
        "max_context": model.config.context_length,
    }
    return LoadedEngine(engine, tokenizer, name_model(checkpoint.path), checkpoint.hash(), resolved)


def choose_precision(options: EngineOptions) -> Literal["fp32", "bf16"]:
    """bf16 where the processor multiplies it by itself; elsewhere it would be emulated and slower than fp32."""
    if options.precision != "auto":
        return options.precision
    if options.device == "cuda":
        return "bf16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def make_cache(model: Model, options: EngineOptions, dtype: torch.dtype) -> PagedCache:
    """A KV cache of as many whole blocks as the budget holds. Raises InputError if that is none."""
    config = model.config
    bytes_each = block_bytes(model.layout, config.kv_heads, config.head_size, dtype)
    budget = options.kv_cache_bytes or int(read_available_bytes() * options.kv_memory_share)
    num_blocks = budget // bytes_each
    if num_blocks < 1:
        raise InputError(
            f"kv_cache_bytes of {budget} holds no KV block: one block of this model takes {bytes_each} bytes"
        )
    return PagedCache(model.layout, num_blocks, config.kv_heads, config.head_size, dtype, options.device)
