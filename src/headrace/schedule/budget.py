"""What a step may compute: tokens, and time where steps have a deadline. What each token sees counts.

Sarathi-Serve's budget of tokens (arXiv 2403.02310, section 4.3) is one for all steps. Here each step has its own,
because a token over a context of 8,000 takes longer than one over 80.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from headrace.meter.operations import Piece
from headrace.meter.step_time import TILE, StepTime, interpolate


@dataclass(frozen=True, slots=True)
class Deadline:
    """A step shall take no longer than `seconds`, as `step_time` foresees it."""

    seconds: float
    step_time: StepTime


class Budget:
    """What a step may still compute: so many `tokens`, and of prompts what there is time for until the deadline.

    A tile of prompts is computed in any case: else who comes would wait until others have ended.
    """

    def __init__(self, tokens: int, deadline: Deadline | None = None) -> None:
        self.tokens = tokens
        self.deadline = deadline
        self._whole = tokens
        self._granted = TILE
        self._wanted = 0
        self._attention = 0.0

    def spend_time(self, pieces: Iterable[Piece]) -> None:
        """These will be computed; their tokens have been taken already."""
        if self.deadline is None:
            return
        pieces = list(pieces)
        self._wanted += sum(piece.wanted for piece in pieces)
        self._attention += self.deadline.step_time.attend(pieces)

    def take_chunk(self, start: int, length: int) -> None:
        """A chunk of a prompt will be computed."""
        self.tokens -= length
        self._granted -= length
        self.spend_time([Piece(start, length, 1, False)])

    def fitting(self, start: int, most: int) -> int:
        """Tokens of a prompt, at most `most`, from position `start` on that there is time for, or that are granted.

        Those in time end a tile of the step's tokens, as products work in tiles, or are the whole of `most`.
        """
        if self.deadline is None:
            return most
        times, taken = self.deadline.step_time, self._whole - self.tokens

        def reach(tiles: int) -> int:
            return min(most, tiles * TILE - taken)

        def foresee(tiles: int) -> float:
            length = reach(tiles)
            seconds = interpolate(times.tokens, taken + length) + interpolate(times.wanted, self._wanted + 1)
            return seconds + self._attention + times.attend([Piece(start, length, 1, False)])

        tiles = range(taken // TILE + 1, -(-(taken + most) // TILE) + 1)
        fitting = bisect_right(tiles, self.deadline.seconds, key=foresee)
        in_time = reach(tiles[fitting - 1]) if fitting else 0
        return max(in_time, min(most, self._granted))
