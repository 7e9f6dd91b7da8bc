"""What a schedule is: the order in which those who wait are taken up."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Protocol

from headrace.core import Sequence
from headrace.schedule.state import SchedulerState


class Schedule(Protocol):
    """Decides who runs first; how a step is made of it is `step.plan_step`, the same for every schedule.

    `window` is how many waiting sequences it wants to see at once; whoever feeds the engine brings as many, if there
    are. None: only as many as will run soon.
    """

    window: int | None

    def arrange(self, waiting: Rows[Sequence], state: SchedulerState) -> list[Sequence]:
        """The same sequences in the order in which they are to be admitted. Called when new ones have arrived,
        and when none is new but few are left, whose lengths are known better by then.

        Pure: changes nothing, and answers the same again. `waiting` holds those that never ran, the ones that waited
        before in the order that the last call gave them, then the new ones as they came; preempted ones go before
        them all and are not asked about. All are foreground or all are background, which goes after the foreground
        and is asked about by itself. Continuations of one request stay neighbours.
        """
        ...
