"""What a schedule is: one pure function from the state to the next step's plan."""

from __future__ import annotations

from typing import Protocol

from headrace.core import StepPlan
from headrace.schedule.state import Limits, SchedulerState


class Schedule(Protocol):
    """Decides what the next step computes.

    There is no prefill and no decode phase: a sequence has known and computed tokens, and a step computes some more.
    """

    def plan(self, state: SchedulerState, limits: Limits) -> StepPlan:
        """The next step, sequences by number. Pure: reads the state, changes nothing, and answers the same again.

        `apply` executes the plan in this order, so a plan must hold together in it:

        1. `preempt`: running sequences, newest first; they give up all blocks and go to the front of the queue.
        2. `admit`: waiting sequences, in the order in which they will run, with the whole blocks of tokens that the
           prefix tree has of them now.
        3. `chunks`: at most one for each running or admitted sequence, starting at what it has computed, no longer
           than what it knows. New blocks are taken in the order of the chunks.

        Promises that every schedule keeps: chunks hold at most `limits.step_tokens` tokens; at most
        `limits.max_sequences` sequences run; the blocks for all chunks can be had; no sequence is both preempted and
        admitted; and while sequences wait or run, some plan within a bounded number of steps computes a token of the
        oldest one, so every sequence finishes.
        """
        ...
