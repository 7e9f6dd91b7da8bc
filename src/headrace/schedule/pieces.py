"""What a planned step computes, as the meter and the simulator count it: its chunks in numbers."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from itertools import takewhile

from headrace.cache.layout import CacheLayout
from headrace.core import Chunk, Sequence
from headrace.meter.operations import Piece


def describe_pieces(scheduled: Rows[tuple[Chunk, Sequence]], layout: CacheLayout, references: list[int]) -> list[Piece]:
    """What the meter counts of a step, before the step changes the sequences. references: holders of each block."""
    whole = next((index for index, group in enumerate(layout.groups) if group.window is None), None)
    read: set[int] = set()
    pieces = []
    for chunk, sequence in scheduled:
        blocks = [] if whole is None else sequence.tables[whole][: chunk.start // layout.block_size]
        held = list(takewhile(lambda block: references[block] > 1, blocks))
        shared = sum(1 for block in held if block in read) * layout.block_size
        read.update(held)
        output = chunk.start >= sequence.prompt_length
        logits = 0 if sequence.request.embed else len(wanted_rows(chunk, sequence))
        pieces.append(Piece(chunk.start, chunk.length, logits, output, shared))
    return pieces


def wanted_rows(chunk: Chunk, sequence: Sequence) -> range:
    """The chunk's tokens, counted from its start, whose hidden states are wanted: for logits, or for an embedding."""
    if sequence.request.score:
        return range(min(chunk.length, len(sequence.tokens) - 1 - chunk.start))
    if sequence.request.embed == "mean":
        return range(chunk.length)
    reaches_end = chunk.start + chunk.length == len(sequence.tokens)
    return range(chunk.length - 1, chunk.length) if reaches_end else range(0)
