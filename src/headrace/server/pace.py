"""How much prefill a step may hold, so that the answers beside it go on without a halt. Knows no request."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from headrace.checkpoint import open_checkpoint
from headrace.engine.engine import Engine
from headrace.engine.loading import choose
from headrace.meter.step_time import describe_setting, load_step_time
from headrace.options import EngineOptions

LOG = logging.getLogger("headrace.server")
# Tokens a step on a machine whose steps nobody has measured: a tenth of a second for 100 million parameters.
UNMEASURED = 256


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that prefill may make of the time between two tokens; how long a short prompt is; seconds for which a
    conversation's KV stays for its next turn."""

    itl_target: float
    short_prefill: int
    program_seconds: float

    def fit(self, options: EngineOptions) -> EngineOptions:
        """The options with `step_tokens` such that no step takes longer than the target, contexts being short.

        The budget is Sarathi-Serve's (arXiv 2403.02310, section 4.3). A `step_seconds` that is given stays.
        """
        if options.step_seconds is not None:
            return options
        checkpoint = open_checkpoint(options.model)
        choice = choose(options, checkpoint)
        found = load_step_time(describe_setting(checkpoint.hash(), choice.machine, choice.settings))
        most = choice.options.step_tokens
        if found is not None:
            return replace(options, step_tokens=found.most_tokens(self.itl_target, most))
        most = min(UNMEASURED, most)
        LOG.warning("steps of %s hold %d tokens: `headrace bench steps` measures how many fit", options.model, most)
        return replace(options, step_tokens=most)

    def apply(self, engine: Engine) -> None:
        """Let a new engine keep to it."""
        engine.state.limits = replace(engine.state.limits, short_prefill=self.short_prefill)
        engine.keep_seconds = self.program_seconds
