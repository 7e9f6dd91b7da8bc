"""First come, first served."""

from __future__ import annotations

from collections.abc import Sequence as Rows

from headrace.core import Sequence
from headrace.schedule.state import SchedulerState


class FirstComeFirstServed:
    """In the order of arrival."""

    window: int | None = None

    def arrange(self, waiting: Rows[Sequence], state: SchedulerState) -> list[Sequence]:
        """See `Schedule.arrange`."""
        return list(waiting)
