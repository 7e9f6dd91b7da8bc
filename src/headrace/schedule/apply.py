"""What changes the scheduler's state: ordering the queue, executing a plan, counting it, taking sequences out."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from headrace.core import Sequence, StepPlan
from headrace.schedule.base import Schedule
from headrace.schedule.pieces import count_shrinking
from headrace.schedule.state import SchedulerState


def arrange(schedule: Schedule, state: SchedulerState) -> bool:
    """Put those who wait in the schedule's order if any has arrived since the last time, or if they are the last;
    whether it did.

    The last `max_sequences` are ordered anew whenever half of them have gone: more is known of lengths by then, and a
    long row that started at the very end would run alone.
    """
    if state.arrived:
        arrange_arrived(schedule, state)
    elif state.waiting and 2 * len(state.waiting) <= min(state.asked, 2 * state.limits.max_sequences):
        arrange_last(schedule, state)
    else:
        return False
    state.asked = len(state.waiting)
    return True


def arrange_arrived(schedule: Schedule, state: SchedulerState) -> None:
    """Preempted ones stay first. All background goes after all foreground, and each is left as it is if none of its
    kind has arrived: a request does not cost a look at a large batch behind it."""
    arrived: list[Sequence] = []
    while state.waiting and state.waiting[-1].number > state.arranged:
        arrived.append(state.waiting.pop())
    arrived.reverse()
    foreground = [each for each in arrived if not each.request.background]
    background = [each for each in arrived if each.request.background]
    before = count_foreground(state)
    if background:
        behind = [state.waiting.pop() for _ in range(len(state.waiting) - before)]
        state.waiting.extend(order_waiting(schedule, behind[::-1] + background, state))
    if foreground:
        ahead = [state.waiting.popleft() for _ in range(before)]
        state.waiting.extendleft(reversed(order_waiting(schedule, ahead + foreground, state)))
    state.arranged = max([state.arranged, *(each.number for each in arrived)])


def arrange_last(schedule: Schedule, state: SchedulerState) -> None:
    """All who wait in the schedule's order, as it is now."""
    waiting, before = list(state.waiting), count_foreground(state)
    state.waiting.clear()
    for part in (waiting[:before], waiting[before:]):
        state.waiting.extend(order_waiting(schedule, part, state))


def order_waiting(schedule: Schedule, waiting: list[Sequence], state: SchedulerState) -> list[Sequence]:
    """Preempted ones as they stand, then the others as the schedule wants them."""
    again = [each for each in waiting if each.preemptions]
    return again + schedule.arrange([each for each in waiting if not each.preemptions], state)


def count_foreground(state: SchedulerState) -> int:
    """Waiting sequences before the first of the background."""
    if not state.background:
        return len(state.waiting)
    return sum(1 for _ in takewhile(lambda each: not each.request.background, state.waiting))


def apply(plan: StepPlan, state: SchedulerState) -> None:
    """Admit, preempt and take blocks, in this order: afterwards the tables have room for every chunk.

    What is admitted comes first, so that nothing of its hits is evicted where the preempted let go of them. A preempted
    sequence forgets what it computed, not what it generated. `cached_tokens` is what its first admission found in the
    prefix tree; what it finds again after a preemption is its own work and is not counted. From its first admission on
    a sequence has its tokens to itself.
    """
    for admission in plan.admit:
        sequence = state.find(admission.sequence)
        state.ledger.admit(sequence, admission.cached)
        state.waiting.remove(sequence)
        state.running.append(sequence)
        sequence.computed = admission.cached
        if sequence.preemptions == 0:
            sequence.tokens = sequence.tokens[:]
            sequence.cached_tokens = admission.cached
    for number in plan.preempt:
        sequence = state.find(number)
        state.ledger.release(sequence)
        state.running.remove(sequence)
        state.waiting.insert(count_foreground(state) if sequence.request.background else 0, sequence)
        sequence.computed = 0
        sequence.preemptions += 1
    for chunk in plan.chunks:
        state.ledger.grow(state.find(chunk.sequence), chunk.start + chunk.length)


def advance(plan: StepPlan, state: SchedulerState) -> None:
    """The plan's chunks are computed: share their full blocks, release what windows no longer see."""
    ledger, layout = state.ledger, state.ledger.layout
    for chunk in plan.chunks:
        sequence = state.find(chunk.sequence)
        sequence.computed += chunk.length
        state.background_computed += chunk.length * sequence.request.background
        # Only then has a block become full.
        if sequence.computed // layout.block_size > chunk.start // layout.block_size:
            ledger.publish(sequence)
        ledger.slide(sequence)
        blocks = count_shrinking(chunk, sequence, layout)
        if blocks:
            ledger.shrink(sequence, blocks)


def finish(sequence: Sequence, state: SchedulerState, keep_until: float | None = None) -> None:
    """Take out a running sequence that is complete; the forecast learns its length.

    If it belongs to a program, its KV is kept for the next turn until `keep_until`, a time on the clock of `expire`.
    """
    if keep_until is not None and sequence.request.program:
        state.ledger.keep(sequence, keep_until)
    state.running.remove(sequence)
    state.ledger.release(sequence)
    state.forget(sequence)
    state.lengths.record(sequence)


def expire(state: SchedulerState, now: float) -> bool:
    """Let go of what was kept for programs until now or before; whether any block can be had no more. To be called
    between steps, when it matters."""
    return state.ledger.expire(now)


def abort(sequences: Iterable[Sequence], state: SchedulerState) -> None:
    """Take out sequences, waiting or running, that are not wanted any more. Their lengths teach nothing.

    However many they are, the queue is looked through once.
    """
    gone = set()
    for sequence in sequences:
        if sequence.number in state.ledger.holdings:
            state.running.remove(sequence)
            state.ledger.release(sequence)
        else:
            gone.add(sequence.number)
        state.forget(sequence)
    if gone:
        left = [each for each in state.waiting if each.number not in gone]
        state.waiting.clear()
        state.waiting.extend(left)
