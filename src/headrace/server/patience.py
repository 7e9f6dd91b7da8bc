"""For how long a conversation's KV is kept for its next turn: a fixed time, or one that is learned from earlier turns.

Continuum (arXiv 2511.02230, section 4): keeping for t seconds saves the prefix's computing and a wait in the queue if
the next turn comes by then, and costs t seconds of memory. Its distribution by tool is left out: an independent study
found it to gain nothing. One thread owns it. Knows no cache.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from statistics import fmean

from headrace.core import Request

# Turns by which the time is judged; with fewer, their mean stands for them all, as if gaps were exponential.
SAMPLES, ENOUGH = 1000, 100
# Programs whose last turn's end is remembered.
MOST_PROGRAMS = 4096

Clock = Callable[[], float]


def choose_seconds(gaps: Iterable[float], benefit: float) -> float:
    """How long to keep so that what is saved, less the time itself, is most: argmax over t of P(gap <= t) benefit - t.

    gaps: seconds between turns so far; benefit: seconds that a kept prefix saves.
    """
    ordered = sorted(gaps)
    if not ordered:
        return 0.0
    if len(ordered) < ENOUGH:
        mean = max(fmean(ordered), 1e-6)
        return mean * math.log(benefit / mean) if benefit > mean else 0.0
    candidates = [0.0, *ordered]
    return max(candidates, key=lambda t: bisect_right(ordered, t) / len(ordered) * benefit - t)


class Patience:
    """`seconds` is the time while nothing is known, and for ever unless `learned`."""

    def __init__(self, seconds: float, learned: bool, clock: Clock = time.monotonic) -> None:
        self.seconds = seconds
        self.learned = learned
        self._clock = clock
        self._gaps: deque[float] = deque(maxlen=SAMPLES)
        self._waits: deque[float] = deque(maxlen=SAMPLES)
        self._ends: OrderedDict[tuple[str, str], float] = OrderedDict()

    def note_arrival(self, request: Request) -> None:
        """A turn has come."""
        ended = self._ends.pop((request.owner, request.program), None) if request.program else None
        if ended is not None:
            self._gaps.append(self._clock() - ended)

    def note_wait(self, seconds: float) -> None:
        """A request has waited so long for its first step."""
        self._waits.append(seconds)

    def end(self, request: Request, reload_seconds: float) -> float:
        """A turn has ended whose KV takes so long to compute again: for how long to keep it."""
        if not request.program:
            return 0.0
        self._ends[request.owner, request.program] = self._clock()
        if len(self._ends) > MOST_PROGRAMS:
            self._ends.popitem(last=False)
        if not self.learned or not self._gaps:
            return self.seconds
        return choose_seconds(self._gaps, reload_seconds + (fmean(self._waits) if self._waits else 0.0))
