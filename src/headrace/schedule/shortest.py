"""Shortest predicted work first, with ageing: answers come early on average, and nothing waits for ever.

After shortest-remaining-processing-time scheduling with predicted lengths (arXiv 2408.15792; arXiv 2602.12716 for jobs
that are revealed bit by bit): on a processor where a token costs much the same in a prompt and in an output, the prompt
carries most of the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

from headrace.core import Sequence
from headrace.schedule.state import SchedulerState

AGEING = 16.0


class ShortestFirst:
    """By tokens to compute: the prompt's, and as many outputs as rows of its kind have had (else `max_tokens`).

    Each later arrival makes those that wait AGEING tokens cheaper, so a sequence is overtaken by at most
    (its work - the shortest work) / AGEING later ones.
    """

    window: int | None = 4096

    def arrange(self, waiting: Rows[Sequence], state: SchedulerState) -> list[Sequence]:
        """See `Schedule.arrange`."""

        def key(sequence: Sequence) -> tuple[float, int]:
            work = sequence.prompt_length + state.lengths.expected(sequence.request)
            arrival = sequence.number - sequence.index
            return work + AGEING * arrival, sequence.number

        return sorted(waiting, key=key)
