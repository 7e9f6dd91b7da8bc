"""The whole pile planned: what shares a prefix runs together, decode-heavy rows first, no long row last."""

from __future__ import annotations

import sys
from collections.abc import Sequence as Rows

from headrace.core import Sequence
from headrace.schedule.prefixes import grow_tree, order_rows, pack
from headrace.schedule.state import SchedulerState


class Planned:
    """The order of `schedule.prefixes` over a window of the pile: all of it, if `window_bytes` hold it.

    What is left of the window before goes first, so nothing is overtaken by more than its own window. Where nothing is
    new, all is ordered by what is known of lengths by now; equals keep their order.
    """

    # All that `window_bytes` hold.
    window: int | None = sys.maxsize

    def arrange(self, waiting: Rows[Sequence], state: SchedulerState) -> list[Sequence]:
        """See `Schedule.arrange`."""
        left = [each for each in waiting if each.number <= state.arranged]
        new = [each for each in waiting if each.number > state.arranged]
        if not new:
            left, new = new, left
        decode = [state.lengths.expected(each.request) for each in new]
        owners = [each.request.owner for each in new]
        tree = grow_tree([pack(each.tokens) for each in new], decode, state.ledger.layout.block_size, owners)
        return left + [new[place] for place in order_rows(tree, state.limits.max_sequences)]
