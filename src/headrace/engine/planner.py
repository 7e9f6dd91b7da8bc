"""Which step comes next: the queue put in order, blocks fetched from disk, the plan; made ahead where a core is idle.

Knows nothing of tensors and of what is generated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

from headrace.cache.tier import Tier
from headrace.core import Sequence, StepPlan
from headrace.meter.stopwatch import Stopwatch
from headrace.schedule.apply import advance, apply, arrange, expire
from headrace.schedule.base import Schedule
from headrace.schedule.state import Limits, SchedulerState
from headrace.schedule.step import plan_step

# Stands for a token that is being computed, in a plan that asks only how many there are.
UNKNOWN = 0


class Planner:
    """Plans an engine's steps; with `ahead`, each next one in a thread while a step computes.

    A plan that was made ahead is the one that would be made afterwards: it is used if nobody came, ended or was taken
    out meanwhile, and forgotten otherwise. So it changes no step and no answer: the asynchronous scheduling of NanoFlow
    (arXiv 2408.12757, and its code) without the token that each ended sequence is given too many there.
    """

    def __init__(self, schedule: Schedule, ahead: bool = False) -> None:
        self.schedule = schedule
        self._thread = ThreadPoolExecutor(1, "headrace-planner") if ahead else None
        self._next: tuple[StepPlan, Limits] | None = None

    def plan(self, state: SchedulerState, tier: Tier | None, watch: Stopwatch) -> StepPlan:
        """The next step. Where those whom it admits have blocks on disk, these come back, and it is planned anew. The
        disk reads meanwhile what those who come next will want."""
        changed = expire(state, time.monotonic())
        changed = arrange(self.schedule, state) or changed
        known, self._next = self._next, None
        if known is not None and not changed and known[1] == state.limits:
            plan = known[0]
        else:
            plan = plan_step(state, state.limits)
        if tier is None:
            return plan
        room = tier.room
        while room > 0 and plan.admit:
            with watch.part("files"):
                taken = tier.restore([state.find(each.sequence) for each in plan.admit], room)
            if not taken:
                break
            room -= taken
            plan = plan_step(state, state.limits)
        with watch.part("files"):
            tier.prefetch(state.waiting)
        return plan

    def close(self) -> None:
        """Let go of the thread."""
        if self._thread is not None:
            self._thread.shutdown()

    def forget(self) -> None:
        """Somebody came, ended or was taken out: what was planned ahead does not hold."""
        self._next = None

    @contextmanager
    def advancing(self, plan: StepPlan, state: SchedulerState, tier: Tier | None) -> Iterator[None]:
        """For `with`, around the arithmetic of a plan that has been applied: afterwards its chunks count as computed.

        If it fails, none does. Where the next step is planned meanwhile they count beforehand, and nobody knows which
        blocks were written: then all that ran waits again, and the prefix tree is empty. What goes to disk does so
        before it counts, so with a tier nothing is planned ahead.
        """
        sequences = [state.find(chunk.sequence) for chunk in plan.chunks]
        lengths = [chunk.length for chunk in plan.chunks]
        if self._thread is None or tier is not None or any(map(ends, sequences, lengths)):
            yield
            advance(plan, state)
            return
        try:
            advance(plan, state)
            with self._planning(state, [each for each in sequences if each.computed == len(each.tokens)]):
                yield
        except BaseException:
            self.forget()
            start_again(state)
            raise

    @contextmanager
    def _planning(self, state: SchedulerState, generating: list[Sequence]) -> Iterator[None]:
        """For `with`, while the next token of each of these is computed: plan as if it were there."""
        assert self._thread is not None
        lengths, futures = [len(sequence.tokens) for sequence in generating], []
        try:
            for sequence in generating:
                sequence.tokens.append(UNKNOWN)
            futures.append(self._thread.submit(plan_step, state, state.limits))
            yield
        finally:
            try:
                wait(futures)
            finally:
                # Wherever an interrupt comes, nobody may take it for a token.
                for sequence, length in zip(generating, lengths, strict=True):
                    del sequence.tokens[length:]
        self._next = futures[0].result(), state.limits


def ends(sequence: Sequence, length: int) -> bool:
    """Whether a chunk of this length is known to be the last of its sequence: the next step cannot be planned yet."""
    complete = sequence.computed + length == len(sequence.tokens)
    return complete and (not sequence.request.generates or len(sequence.tokens) + 1 >= sequence.max_length)


def start_again(state: SchedulerState) -> None:
    """All that runs waits again, in its order, and nothing of the cache is known any more."""
    apply(StepPlan(preempt=tuple(each.number for each in reversed(state.running))), state)
    state.ledger.expire(math.inf)
    state.ledger.trim(0)
