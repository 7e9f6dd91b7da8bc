"""How long steps may take: so that answers beside a prefill go on without a halt, and no batch is in a client's way.

Nor are clients in a batch's way for ever: they owe batches a share of the time. Knows no request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from headrace.checkpoint import open_checkpoint
from headrace.core import Sequence
from headrace.engine.engine import Engine
from headrace.engine.loading import resolve_options
from headrace.meter.step_time import StepTime, describe_setting, load_step_time, spell_command
from headrace.options import EngineOptions, ServeOptions
from headrace.schedule.budget import Deadline
from headrace.schedule.state import Limits
from headrace.server.patience import Patience

LOG = logging.getLogger("headrace.server")
# Tokens a step on a machine whose steps nobody has measured: a tenth of a second for 100 million parameters.
UNMEASURED = 256
# A client who comes waits for the end of a batch's step. Steps are so short while clients come and go, that is until so
# many seconds after the last one.
GENTLE_SECONDS, CALM_SECONDS = 0.03, 10.0
GENTLE_UNMEASURED = 32
# What batches had in a pause counts for what they are owed later, and the other way round, up to so many seconds.
MOST_DEBT = 1.0

Clock = Callable[[], float]


class Spent(NamedTuple):
    """What steps took and computed, and how much of that for batches: a token takes its part of its step's time."""

    seconds: float
    tokens: int
    background: int


class Pace:
    """One engine's. First `fit` its options, then `take` it; `shift` before each step."""

    def __init__(self, serve: ServeOptions, clock: Clock = time.monotonic) -> None:
        self._serve = serve
        self._clock = clock
        self._measured: StepTime | None = None
        self._limits = self._gentle = self._shared = Limits(1, 1)
        self._busy_until = -1.0
        self._debt = 0.0
        self._owing = False
        self._spent = Spent(0.0, 0, 0)
        self.patience = Patience(serve.program_seconds, serve.program_learned, clock)

    def fit(self, options: EngineOptions) -> EngineOptions:
        """The options with `step_tokens` such that no step over short contexts takes longer than the target.

        The budget is Sarathi-Serve's (arXiv 2403.02310, section 4.3). A `step_seconds` that is given stays. Where steps
        were measured, `take` sets a deadline that knows longer contexts, too.
        """
        checkpoint = open_checkpoint(options.model)
        resolved = resolve_options(options, checkpoint)
        self._measured = load_step_time(describe_setting(checkpoint.hash(), resolved.machine, resolved.settings))
        most = resolved.options.step_tokens
        if options.step_seconds is not None:
            return options
        if self._measured is not None:
            return replace(options, step_tokens=self._measured.most_tokens(self._serve.itl_target, most))
        most = min(UNMEASURED, most)
        command = spell_command(resolved.options)
        LOG.warning("steps of %s hold %d tokens: `%s` measures how many fit", options.model, most, command)
        return replace(options, step_tokens=most)

    def take(self, engine: Engine) -> None:
        """Let an engine that was made with these options keep to it."""
        self._limits = replace(engine.state.limits, short_prefill=self._serve.short_prefill)
        most = self._limits.step_tokens
        few = min(GENTLE_UNMEASURED, most)
        self._gentle = replace(self._limits, step_tokens=few)
        if self._measured is not None:
            few = self._measured.most_tokens(GENTLE_SECONDS, most)
            soon = Deadline(GENTLE_SECONDS, self._measured)
            self._gentle = replace(self._limits, step_tokens=few, deadline=soon)
            target = self._limits.deadline or Deadline(self._serve.itl_target, self._measured)
            self._limits = replace(self._limits, deadline=target)
        self._shared = replace(self._limits, background_tokens=few)
        engine.state.limits = self._limits
        prefill = engine.meter.phases["prefill"]

        def keep(sequence: Sequence) -> float:
            each = prefill.seconds / prefill.tokens if prefill.tokens else 0.0
            return self.patience.end(sequence.request, each * len(sequence.tokens))

        engine.keep = keep

    def shift(self, engine: Engine, clients: bool) -> None:
        """Set the bounds of the next step; `clients`: someone waits for an answer, it is not for batches alone."""
        now = self._clock()
        if clients:
            self._busy_until = now + CALM_SECONDS
        self._settle(engine)
        if clients:
            engine.state.limits = self._shared if self._debt > 0 else self._limits
        else:
            engine.state.limits = self._gentle if now < self._busy_until else self._limits

    def _settle(self, engine: Engine) -> None:
        """Enter the steps since the last time, if batches were there: their share of the time, less what they had."""
        before, self._spent = self._spent, read_spent(engine)
        seconds, tokens, background = (now - then for now, then in zip(self._spent, before, strict=True))
        if self._owing and tokens:
            debt = self._debt + seconds * (self._serve.batch_share - background / tokens)
            self._debt = max(-MOST_DEBT, min(debt, MOST_DEBT))
        self._owing = engine.state.background > 0


def read_spent(engine: Engine) -> Spent:
    """The sums of an engine since it was made."""
    phases = engine.meter.phases.values()
    seconds, tokens = sum(each.seconds for each in phases), sum(each.tokens for each in phases)
    return Spent(seconds, tokens, engine.state.background_computed)
