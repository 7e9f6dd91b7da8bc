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
    size = layout.block_size
    read: set[int] = set()
    pieces = []
    for chunk, sequence in scheduled:
        shared = 0
        # Where blocks are dropped none is shared; what is left counts as if it were at the text's beginning.
        if whole is not None and chunk.start >= size and not sequence.dropped:
            table = sequence.tables[whole]
            if references[table[0]] > 1:
                held = list(takewhile(lambda block: references[block] > 1, table[: chunk.start // size]))
                shared = sum(1 for block in held if block in read) * size
                read.update(held)
        output = chunk.start >= sequence.prompt_length
        logits = 0 if sequence.request.embed else len(wanted_rows(chunk, sequence))
        seen = chunk.start - sequence.dropped * size
        if output and layout.most_read is not None:
            seen = min(seen, layout.most_read)
        pieces.append(Piece(seen, chunk.length, logits, output, shared))
    return pieces


def count_shrinking(chunk: Chunk, sequence: Sequence, layout: CacheLayout) -> int:
    """Blocks that a sequence loses once this chunk is computed: some if it completes a prompt that will be answered, or
    reaches a length at which its policy makes it smaller again."""
    end = chunk.start + chunk.length
    if layout.shrink is None or layout.shrink.find_next(sequence.prompt_length, chunk.start) != end:
        return 0
    return count_lost(sequence, end, layout)


def find_observed(chunk: Chunk, sequence: Sequence, layout: CacheLayout) -> int:
    """The position from which queries count for what stays when the sequence is made smaller next; -1 if none of this
    chunk do, or if nothing will go."""
    if layout.shrink is None or layout.shrink.queries == 0:
        return -1
    following = layout.shrink.find_next(sequence.prompt_length, chunk.start)
    if following is None or not count_lost(sequence, following, layout):
        return -1
    first = layout.shrink.find_observed(sequence.prompt_length, following)
    return first if first < chunk.start + chunk.length else -1


def count_lost(sequence: Sequence, length: int, layout: CacheLayout) -> int:
    """Blocks that a sequence still has and will lose at this length, where it is made smaller."""
    if layout.shrink is None or not sequence.request.generates:
        return 0
    return max(0, layout.shrink.count_dropped(length, layout.block_size) - sequence.dropped)


def wanted_rows(chunk: Chunk, sequence: Sequence) -> range:
    """The chunk's tokens, counted from its start, whose hidden states are wanted: for logits, or for an embedding."""
    if sequence.request.score:
        return range(min(chunk.length, len(sequence.tokens) - 1 - chunk.start))
    if sequence.request.embed == "mean":
        return range(chunk.length)
    reaches_end = chunk.start + chunk.length == len(sequence.tokens)
    return range(chunk.length - 1, chunk.length) if reaches_end else range(0)
