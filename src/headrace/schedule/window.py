"""How many requests wait: as many as the schedule wants to see at once, and no more memory than that."""

from __future__ import annotations

from headrace.schedule.base import Schedule
from headrace.schedule.state import SchedulerState

# Prompt tokens of unfinished requests; a token takes some 50 bytes while its row is on its way.
MOST_TOKENS = 2_000_000


class Window:
    """Says when to add requests: until the window is full, and again when few of them are left to admit.

    In between the queue keeps its order, and a large pile is planned window by window. `filled` counts windows.
    """

    def __init__(self, state: SchedulerState, schedule: Schedule, lazy: bool = False) -> None:
        """lazy: requests may come from one who waits for earlier answers, so only those that run soon are asked for."""
        self.state = state
        self.few = 2 * state.limits.max_sequences
        self.rows = self.few if lazy else max(schedule.window or 0, self.few)
        self.filling = True
        self.filled = 0

    def wants(self, pending_tokens: int) -> bool:
        """Whether another request should be added before the next step, with so many prompt tokens unfinished."""
        waiting = len(self.state.waiting)
        if self.filling and waiting and (waiting >= self.rows or pending_tokens >= MOST_TOKENS):
            self.filling = False
            self.filled += 1
        elif waiting == 0 or (waiting < self.few and pending_tokens < MOST_TOKENS // 2):
            self.filling = True
        return self.filling
