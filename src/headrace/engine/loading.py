"""From options to an engine that is ready to run: checkpoint, kernels, model, KV cache, schedule."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from headrace.cache.paged import PagedCache
from headrace.cache.policies.base import KVPolicy
from headrace.cache.policies.choice import make_policy, spell_policy
from headrace.cache.store import BlockStore
from headrace.cache.tier import Tier
from headrace.checkpoint import Checkpoint, Tokenizer, name_model, open_checkpoint
from headrace.checkpoint.hashes import cache_folder
from headrace.core import InputError
from headrace.engine.caching import open_cache
from headrace.engine.engine import Engine
from headrace.engine.memory import give_back_memory
from headrace.engine.planner import Planner
from headrace.engine.precision import choose_precision
from headrace.engine.tuned import apply_tuned
from headrace.kernels import choose_kernels
from headrace.kernels.base import Kernels
from headrace.kernels.timed import TimedKernels
from headrace.meter.meter import Meter
from headrace.meter.peaks import count_cores, describe_machine, load_peaks
from headrace.meter.report import list_versions
from headrace.meter.step_time import describe_setting, load_step_time, spell_command
from headrace.meter.stopwatch import Stopwatch
from headrace.model import ModelSettings, load_model
from headrace.options import EngineOptions, PrecisionName
from headrace.quant import FORMATS
from headrace.quant.packed import read_note
from headrace.schedule.budget import Deadline
from headrace.schedule.choice import SCHEDULES
from headrace.schedule.state import SchedulerState

# Raised whenever weights are quantised or packed in another way: what lies in the cache folder is then made anew.
PACKING = 3
# Raised whenever the bytes of a KV block mean something else: what lies in a kv_dir is then not found any more.
KEEPING = 4


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine and what it was made from. `options` are those that it runs with; `resolved` holds every setting as it
    was chosen, and versions."""

    engine: Engine
    options: EngineOptions
    tokenizer: Tokenizer
    model_name: str
    model_hash: str
    resolved: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ResolvedOptions:
    """What the settings come to on this machine for one model, before any weight is read.

    `options` are those asked for, with what `headrace tune` has found in place of defaults, and `step_tokens` as
    `step_seconds` allows over short contexts; `deadline` knows the longer ones.
    """

    options: EngineOptions
    kernels: Kernels
    precision: PrecisionName
    precision_reason: str
    threads: int
    policy: KVPolicy
    threads_reason: str
    deadline: Deadline | None = None

    @property
    def machine(self) -> str:
        return describe_machine(self.kernels.instruction_set)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting as it was chosen."""
        return asdict(self.options) | {
            "precision": self.precision,
            "precision_reason": self.precision_reason,
            "kernels": self.kernels.name,
            "instruction_set": self.kernels.instruction_set,
            "threads": self.threads,
            "threads_reason": self.threads_reason,
        }


def resolve_options(options: EngineOptions, checkpoint: Checkpoint) -> ResolvedOptions:
    """Raises InputError for settings that cannot work here."""
    policy = make_policy(options.kv)
    options = replace(options, kv=spell_policy(options.kv))
    kernels = choose_kernels(options.kernels, options.device, options.instruction_set)
    precision, why = choose_precision(options, kernels.instruction_set, checkpoint.hash())
    machine = describe_machine(kernels.instruction_set)
    asked, options = options.threads, apply_tuned(options, checkpoint.hash(), machine, precision)
    threads, why_threads = options.threads or count_cores(), name_reason(asked, options.threads)
    resolved = ResolvedOptions(options, kernels, precision, why, threads, policy, why_threads)
    if options.step_seconds is None:
        return resolved
    found = load_step_time(describe_setting(checkpoint.hash(), machine, resolved.settings))
    if found is None:
        raise InputError(f"step_seconds needs to know what steps take here, once: run `{spell_command(options)}`")
    most = found.most_tokens(options.step_seconds, options.step_tokens)
    deadline = Deadline(options.step_seconds, found)
    return replace(resolved, options=replace(options, step_tokens=most), deadline=deadline)


def name_reason(asked: int | None, threads: int | None) -> str:
    """Why there are so many threads, from those asked for and those of the tuned options."""
    return "asked for" if asked is not None else "all cores" if threads is None else "tuned"


def plans_ahead(options: EngineOptions, threads: int) -> bool:
    """Whether a step is planned while the one before is computed: where no thread of the kernels waits for that."""
    spare = options.device != "cpu" or threads < count_cores()
    return spare if options.plan_ahead == "auto" else options.plan_ahead == "on"


def load_engine(options: EngineOptions) -> LoadedEngine:
    """Load the model and give it a KV cache within the budget.

    Raises ModelError for a model that cannot be used, InputError for settings that cannot work here.
    """
    watch = Stopwatch()
    checkpoint = open_checkpoint(options.model)
    resolved = resolve_options(options, checkpoint)
    options, kernels = resolved.options, TimedKernels(resolved.kernels, watch)
    precision, threads = resolved.precision, resolved.threads
    settings = ModelSettings(
        precision=precision,
        device=options.device,
        max_context=options.max_context,
        packed_path=name_packed(checkpoint, precision, kernels.name) if options.keep_packed else None,
        outdated=list_outdated(checkpoint, kernels.name),
    )
    kernels.set_threads(threads)
    model = load_model(checkpoint, kernels, settings)
    # What loading took beside the weights: the cache's share is one of the memory that is free.
    give_back_memory()
    cache, state = open_cache(model, resolved.policy, options)
    state.limits = replace(state.limits, deadline=resolved.deadline)
    context = model.config.context_length
    tokenizer = checkpoint.tokenizer()
    meter = Meter(model.shape, load_peaks(resolved.machine, threads), watch)
    planner = Planner(SCHEDULES[options.schedule](), plans_ahead(options, threads))
    engine = Engine(model, tokenizer, cache, state, planner, options.seed, meter)
    if options.kv_dir is not None:
        cache.tier = open_tier(options, cache, state, identify(resolved, checkpoint, model.note, context))
        engine.counters.kv_store = cache.tier.store.counts
    settled = resolved.settings | {
        "weights": model.note,
        "kv_cache_bytes": cache.num_blocks * cache.layout.block_bytes,
        "max_context": model.config.context_length,
    }
    return LoadedEngine(engine, options, tokenizer, name_model(checkpoint.path), checkpoint.hash(), settled)


def change_kv(engine: Engine, options: EngineOptions) -> EngineOptions:
    """Give an engine in which nothing waits or runs an empty cache of options.kv, within options.kv_cache_bytes. The
    options come back with the policy as `spell_policy` has it.

    Raises InputError for a policy that cannot serve the model or a kv_dir that cannot be used, ValueError while a
    request is unfinished. The cache is then what it was.
    """
    if engine.unfinished:
        raise ValueError(f"the cache of an engine with {engine.unfinished} unfinished requests cannot be changed")
    options = replace(options, kv=spell_policy(options.kv))
    cache, state = open_cache(engine.model, make_policy(options.kv), options)
    tier = engine.cache.tier
    if tier is not None:
        cache.tier = open_tier(options, cache, state, tier.identity, tier)
        cache.tier.store.counts = engine.counters.kv_store
        if cache.tier.store is not tier.store:
            tier.close()
    engine.recache(cache, state)
    return options


def name_packed(checkpoint: Checkpoint, precision: str, kernels: str, packing: int = PACKING) -> Path:
    """Where this model's packed weights lie: another model, configuration, format or form of packing lies elsewhere."""
    facts = json.dumps([checkpoint.hash(), dict(checkpoint.config), precision, kernels, packing], default=str)
    name = hashlib.sha256(facts.encode()).hexdigest()[:24]
    return cache_folder() / "packed" / f"{name}.safetensors"


def list_outdated(checkpoint: Checkpoint, kernels: str) -> tuple[Path, ...]:
    """Where earlier forms of packing kept this model's weights, in every format: nothing reads them any more."""
    forms = product(FORMATS, range(1, PACKING))
    return tuple(name_packed(checkpoint, precision, kernels, packing) for precision, packing in forms)


def describe_weights(options: EngineOptions, checkpoint: Checkpoint, precision: str, kernels: str) -> str:
    """How the weights that would be loaded were made, where a text decided it; "" where the checkpoint and the format
    alone do."""
    return read_note(name_packed(checkpoint, precision, kernels)) if options.keep_packed else ""


def identify(resolved: ResolvedOptions, checkpoint: Checkpoint, weights: str, context: int) -> str:
    """Everything but tokens and policy that the bytes of a KV block depend on, as hexadecimal digits."""
    options, kernels = resolved.options, resolved.kernels
    versions = [(name, number) for name, number in list_versions().items() if name in ("headrace", "torch")]
    model = [checkpoint.hash(), dict(checkpoint.config), weights, context]
    arithmetic = [resolved.precision, kernels.name, kernels.instruction_set, options.device, versions]
    facts = json.dumps([KEEPING, *model, *arithmetic], default=str)
    return hashlib.sha256(facts.encode()).hexdigest()


def open_tier(
    options: EngineOptions, cache: PagedCache, state: SchedulerState, identity: str, before: Tier | None = None
) -> Tier:
    """The tier below the cache. Where the one before it has the same blocks, it takes over the store, whose files are
    locked. Raises InputError for a folder that cannot be used."""
    layout = cache.layout
    root = hashlib.sha256(f"{identity} {spell_policy(options.kv, whole=True)} {layout}".encode())
    if before is not None and before.root == root.digest():
        store = before.store
    else:
        folder = Path(options.kv_dir or "").expanduser()
        store = BlockStore(folder, root.hexdigest()[:32], layout.block_bytes, options.kv_dir_bytes)
    return Tier(store, state.ledger, cache.arena, root.digest(), identity)
