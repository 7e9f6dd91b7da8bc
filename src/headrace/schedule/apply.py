"""What changes the scheduler's state: ordering the queue, executing a plan, counting it, taking sequences out."""

from __future__ import annotations

from headrace.core import Sequence, StepPlan
from headrace.schedule.base import Schedule
from headrace.schedule.state import SchedulerState


def arrange(schedule: Schedule, state: SchedulerState) -> None:
    """Put those who wait in the schedule's order if any has arrived since the last time; preempted ones stay first."""
    if not state.arrived:
        return
    again = [each for each in state.waiting if each.preemptions]
    new = [each for each in state.waiting if not each.preemptions]
    state.waiting.clear()
    state.waiting.extend(again)
    state.waiting.extend(schedule.arrange(new, state))
    state.arrived = False
    state.arranged = max([state.arranged, *(each.number for each in new)])


def apply(plan: StepPlan, state: SchedulerState) -> None:
    """Preempt, admit and take blocks, in this order: afterwards the tables have room for every chunk.

    A preempted sequence forgets what it computed, not what it generated. `cached_tokens` is what its first admission
    found in the prefix tree; what it finds again after a preemption is its own work and is not counted.
    """
    for number in plan.preempt:
        sequence = state.find(number)
        state.ledger.release(sequence)
        state.running.remove(sequence)
        state.waiting.appendleft(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
    for admission in plan.admit:
        sequence = state.find(admission.sequence)
        state.waiting.remove(sequence)
        state.running.append(sequence)
        state.ledger.admit(sequence, admission.cached)
        sequence.computed = admission.cached
        if sequence.preemptions == 0:
            sequence.cached_tokens = admission.cached
    for chunk in plan.chunks:
        state.ledger.grow(state.find(chunk.sequence), chunk.start + chunk.length)


def advance(plan: StepPlan, state: SchedulerState) -> None:
    """The plan's chunks are computed: share their full blocks, release what windows no longer see."""
    for chunk in plan.chunks:
        sequence = state.find(chunk.sequence)
        sequence.computed += chunk.length
        state.ledger.publish(sequence)
        state.ledger.slide(sequence)


def finish(sequence: Sequence, state: SchedulerState) -> None:
    """Take out a running sequence that is complete; the forecast learns its length."""
    state.running.remove(sequence)
    state.ledger.release(sequence)
    del state.sequences[sequence.number]
    state.lengths.record(sequence)


def abort(sequence: Sequence, state: SchedulerState) -> None:
    """Take out a sequence, waiting or running, that is not wanted any more. Its length teaches nothing."""
    if sequence.number in state.ledger.holdings:
        state.running.remove(sequence)
        state.ledger.release(sequence)
    else:
        state.waiting.remove(sequence)
    del state.sequences[sequence.number]
