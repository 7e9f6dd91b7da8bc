"""How many requests wait: as many as the schedule wants to see at once, and no more memory than that."""

from __future__ import annotations

from collections import Counter

from headrace.core import Constraint, Request
from headrace.schedule.base import Schedule
from headrace.schedule.state import SchedulerState

# What a row takes while it is on its way: its draft, request, sequence and continuation; each token of its prompt, and
# of its logit_bias.
ROW_BYTES, TOKEN_BYTES, BIAS_BYTES = 3072, 4, 128
# A grammar takes so many times the text that it was made of; requests with equal constraints have one together.
GRAMMAR_TIMES = 100


def count_bytes(tokens: int, continuations: int = 1) -> int:
    """Memory for a row of so many prompt tokens that waits for its answer, near enough to bound it."""
    return ROW_BYTES * continuations + TOKEN_BYTES * tokens


class Held:
    """What requests take that are on their way: `bytes`, near enough to bound it."""

    def __init__(self) -> None:
        self.bytes = 0
        self._constraints: Counter[Constraint] = Counter()

    def take(self, request: Request, beside: int = 0) -> None:
        """A request is on its way, and so many bytes of its row's beside it."""
        self.bytes += self._weigh(request) + beside
        constraint = request.params.constraint
        if constraint is not None:
            self._constraints[constraint] += 1

    def give_back(self, request: Request, beside: int = 0) -> None:
        """It is no more."""
        constraint = request.params.constraint
        if constraint is not None:
            self._constraints[constraint] -= 1
            if not self._constraints[constraint]:
                del self._constraints[constraint]
        self.bytes -= self._weigh(request) + beside

    def _weigh(self, request: Request) -> int:
        """Without a grammar that another one has already."""
        params = request.params
        size = count_bytes(len(request.prompt_token_ids), params.n) + BIAS_BYTES * len(params.logit_bias)
        if params.constraint is not None and params.constraint not in self._constraints:
            size += GRAMMAR_TIMES * len(params.constraint.value)
        return size


class Window:
    """Says when to add requests: until the window is full, and again when few of them are left to admit.

    In between the queue keeps its order, and a pile that is larger than `state.window_bytes` is planned window by
    window. `filled` counts windows, of schedules that want to see some.
    """

    def __init__(self, state: SchedulerState, schedule: Schedule, lazy: bool = False) -> None:
        """lazy: requests may come from one who waits for earlier answers, so only those that run soon are asked for."""
        self.state = state
        self.few = 2 * state.limits.max_sequences
        self.rows = self.few if lazy else max(schedule.window or 0, self.few)
        self.filled = 0
        self._planned = schedule.window is not None
        self._open = True

    @property
    def filling(self) -> bool:
        """Whether a window is begun that `filled` does not count yet."""
        return self._open and self._planned

    def wants(self, held_bytes: int) -> bool:
        """Whether another request should be added before the next step, while those unfinished take so much."""
        waiting, most = len(self.state.waiting), self.state.window_bytes
        if self._open and waiting and (waiting >= self.rows or held_bytes >= most):
            self._open = False
            self.filled += self._planned
        elif waiting == 0 or (waiting < self.few and held_bytes < most // 2):
            self._open = True
        # Rows that wait for another one's answer take memory, too, and none of them is in the queue.
        return self._open and (held_bytes < most or not self.state.sequences)
