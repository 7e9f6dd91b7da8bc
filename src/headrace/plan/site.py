"""A model on this machine under some settings, as far as a simulation needs it: no weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace.checkpoint import Checkpoint
from headrace.engine.caching import size_cache
from headrace.engine.loading import ResolvedOptions, resolve_options
from headrace.meter.step_time import StepTime, describe_setting, load_step_time
from headrace.model import describe_kv
from headrace.model.loading import limit_context, read_config
from headrace.options import EngineOptions
from headrace.plan.simulator import Memory
from headrace.quant import FORMATS


@dataclass(frozen=True, slots=True)
class Site:
    """`settings` are the options as they come out here. step_time is None where nobody has measured it."""

    resolved: ResolvedOptions
    memory: Memory
    step_time: StepTime | None

    @property
    def options(self) -> EngineOptions:
        return self.resolved.options

    @property
    def settings(self) -> dict[str, Any]:
        return self.resolved.settings


def open_site(options: EngineOptions, checkpoint: Checkpoint) -> Site:
    """Raises InputError for settings that cannot work here, ModelError for a model that is not supported."""
    resolved = resolve_options(options, checkpoint)
    options = resolved.options
    config = limit_context(read_config(checkpoint.config), options.max_context)
    shape = describe_kv(config, FORMATS[resolved.precision].dtype)
    num_blocks, layout = size_cache(shape, resolved.policy, options)
    memory = Memory(layout, num_blocks, config.context_length)
    setting = describe_setting(checkpoint.hash(), resolved.machine, resolved.settings)
    return Site(resolved, memory, load_step_time(setting))
