"""What a server's clients wait for: by priority, by the age of the conversation, short prompts soon; then the rest.

Turns in the order in which their programs began are Continuum's (arXiv 2511.02230, program-level first come, first
served): a conversation that has come far is not put back behind all that began since.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

from headrace.cache.keeps import program_of
from headrace.core import Sequence
from headrace.schedule.lanes import is_short
from headrace.schedule.planned import Planned
from headrace.schedule.state import SchedulerState

# A long prompt stands in line as if it had come so many sequences later.
LONG_AGE = 64


class Interactive:
    """Foreground by priority, then by the number of its program's first sequence (else its own), then background.

    With `Limits.short_prefill`, long prompts count as LONG_AGE numbers younger: among its equals in priority, a long
    one is overtaken by later short ones, but by fewer than LONG_AGE. Background is in the order of `Planned`.
    """

    window: int | None = Planned.window

    def __init__(self) -> None:
        self.planned = Planned()

    def arrange(self, waiting: Rows[Sequence], state: SchedulerState) -> list[Sequence]:
        """See `Schedule.arrange`."""
        if waiting and waiting[0].request.background:
            return self.planned.arrange(waiting, state)
        limit = state.limits.short_prefill

        def key(sequence: Sequence) -> tuple[int, int, int]:
            request, arrival = sequence.request, sequence.number - sequence.index
            begun = state.programs.get(program_of(request), arrival) if request.program else arrival
            late = 0 if limit is None or is_short(sequence, state.ledger, limit) else LONG_AGE
            return request.priority, begun + late, sequence.number

        return sorted(waiting, key=key)
