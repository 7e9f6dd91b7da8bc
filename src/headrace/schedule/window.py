"""How many requests wait: as many as the schedule wants to see at once, and no more memory than that."""

from __future__ import annotations

from headrace.core import Request
from headrace.schedule.base import Schedule
from headrace.schedule.state import SchedulerState

# What a row takes while it is on its way: its draft, request, sequence and continuation; and each token of its prompt.
ROW_BYTES, TOKEN_BYTES = 3072, 4


def count_bytes(tokens: int, continuations: int = 1) -> int:
    """Memory for a row of so many prompt tokens that waits for its answer, near enough to bound it."""
    return ROW_BYTES * continuations + TOKEN_BYTES * tokens


def weigh(request: Request) -> int:
    """Memory for a request that waits."""
    return count_bytes(len(request.prompt_token_ids), request.params.n)


class Window:
    """Says when to add requests: until the window is full, and again when few of them are left to admit.

    In between the queue keeps its order, and a pile that is larger than `state.window_bytes` is planned window by
    window. `filled` counts windows.
    """

    def __init__(self, state: SchedulerState, schedule: Schedule, lazy: bool = False) -> None:
        """lazy: requests may come from one who waits for earlier answers, so only those that run soon are asked for."""
        self.state = state
        self.few = 2 * state.limits.max_sequences
        self.rows = self.few if lazy else max(schedule.window or 0, self.few)
        self.filling = True
        self.filled = 0

    def wants(self, held_bytes: int) -> bool:
        """Whether another request should be added before the next step, while those unfinished take so much."""
        waiting, most = len(self.state.waiting), self.state.window_bytes
        if self.filling and waiting and (waiting >= self.rows or held_bytes >= most):
            self.filling = False
            self.filled += 1
        elif waiting == 0 or (waiting < self.few and held_bytes < most // 2):
            self.filling = True
        # Rows that wait for another one's answer take memory, too, and none of them is in the queue.
        return self.filling and (held_bytes < most or not self.state.sequences)
