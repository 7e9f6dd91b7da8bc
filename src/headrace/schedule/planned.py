"""The whole pile planned: what shares a prefix runs together, decode-heavy rows first, no long row last."""

from __future__ import annotations

from collections.abc import Sequence as Rows

from headrace.core import Sequence
from headrace.schedule.prefixes import grow_tree, order_rows, pack
from headrace.schedule.state import SchedulerState


class Planned:
    """The order of `schedule.prefixes` over everything that waits: a window of the pile."""

    window: int | None = 16_384

    def arrange(self, waiting: Rows[Sequence], state: SchedulerState) -> list[Sequence]:
        """See `Schedule.arrange`."""
        decode = [state.lengths.expected(each.request) for each in waiting]
        unit = state.ledger.layout.block_size
        tree = grow_tree([pack(each.tokens) for each in waiting], decode, unit)
        return [waiting[place] for place in order_rows(tree, state.limits.max_sequences)]
