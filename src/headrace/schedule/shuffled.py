"""An order that knows nothing: the control that every other schedule is compared with."""

from __future__ import annotations

from collections.abc import Sequence as Rows

from headrace.core import Sequence
from headrace.schedule.state import SchedulerState


class Shuffled:
    """By a fixed scrambling of the requests' numbers of arrival, so it is the same in every run.

    Prefixes that neighbours share are torn apart by it, and long rows may come last: what order is worth shows beside
    it, and a policy that does not beat it has found nothing.
    """

    window: int | None = None

    def arrange(self, waiting: Rows[Sequence], state: SchedulerState) -> list[Sequence]:
        """See `Schedule.arrange`."""
        return sorted(waiting, key=lambda each: (scramble(each.number - each.index), each.index))


def scramble(number: int) -> int:
    """A one-to-one map of 32-bit numbers without visible order (the finaliser of MurmurHash3)."""
    number &= 0xFFFFFFFF
    number = (number ^ number >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    number = (number ^ number >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return number ^ number >> 16
