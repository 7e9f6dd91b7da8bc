"""The schedules by the names that users give."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.schedule.base import Schedule
from headrace.schedule.fcfs import FirstComeFirstServed
from headrace.schedule.interactive import Interactive
from headrace.schedule.planned import Planned
from headrace.schedule.shortest import ShortestFirst
from headrace.schedule.shuffled import Shuffled

SCHEDULES: Mapping[str, type[Schedule]] = {
    "planned": Planned,
    "fcfs": FirstComeFirstServed,
    "shortest": ShortestFirst,
    "random": Shuffled,
    "interactive": Interactive,
}
