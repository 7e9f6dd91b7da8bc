"""Settings that `headrace tune` found to be fast, kept by model, machine and precision. None changes a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from headrace.cache.policies.choice import FULL
from headrace.meter.kept import kept_path, read_kept, write_kept
from headrace.meter.peaks import count_cores
from headrace.options import EngineOptions

TUNED = ("step_tokens", "max_sequences", "block_size", "threads")


def tuned_path() -> Path:
    return kept_path("tuned.json")


def apply_tuned(options: EngineOptions, model_hash: str, machine: str, precision: str) -> EngineOptions:
    """The options, with what was found in place of those that have their default value.

    Under a KV policy block_size stays: what such a cache reads depends on it.
    """
    if not options.tuned:
        return options
    found = load_tuned(model_hash, machine, precision)
    defaults = {each.name: each.default for each in fields(EngineOptions) if each.name in TUNED}
    changes: dict[str, Any] = {
        n: found[n] for n, each in defaults.items() if n in found and getattr(options, n) == each
    }
    if options.kv != FULL:
        changes.pop("block_size", None)
    return replace(options, **changes)


def load_tuned(model_hash: str, machine: str, precision: str) -> dict[str, int]:
    entries = read_kept(tuned_path())
    found = entries.get(name_entry(model_hash, machine, precision)) if isinstance(entries, dict) else None
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, int) and value > 0}


def save_tuned(model_hash: str, machine: str, precision: str, found: Mapping[str, int]) -> Path:
    """Keep settings in place of older ones; none, where the defaults are best. Raises OSError."""
    entries = read_kept(tuned_path()) or {}
    entries[name_entry(model_hash, machine, precision)] = dict(found)
    write_kept(tuned_path(), entries)
    return tuned_path()


def name_entry(model_hash: str, machine: str, precision: str) -> str:
    return f"{model_hash[:16]} {machine} {count_cores()} cores {precision}"
