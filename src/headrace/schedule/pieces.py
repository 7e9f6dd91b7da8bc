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
        # Where blocks are dropped none is shared; what is left counts as if it were at the text's beginning.
        held = [] if sequence.dropped else list(takewhile(lambda block: references[block] > 1, blocks))
        shared = sum(1 for block in held if block in read) * layout.block_size
        read.update(held)
        output = chunk.start >= sequence.prompt_length
        logits = 0 if sequence.request.embed else len(wanted_rows(chunk, sequence))
        seen = chunk.start - sequence.dropped * layout.block_size
        if output and layout.most_read is not None:
            seen = min(seen, layout.most_read)
        pieces.append(Piece(seen, chunk.length, logits, output, shared))
    return pieces


def count_shrinking(chunk: Chunk, sequence: Sequence, layout: CacheLayout) -> int:
    """Blocks that a sequence loses once this chunk is computed: some if it completes a prompt that will be answered."""
    if layout.shrink is None or chunk.start + chunk.length != sequence.prompt_length or not sequence.request.generates:
        return 0
    return layout.shrink.count_dropped(sequence.prompt_length, layout.block_size)


def wanted_rows(chunk: Chunk, sequence: Sequence) -> range:
    """The chunk's tokens, counted from its start, whose hidden states are wanted: for logits, or for an embedding."""
    if sequence.request.score:
        return range(min(chunk.length, len(sequence.tokens) - 1 - chunk.start))
    if sequence.request.embed == "mean":
        return range(chunk.length)
    reaches_end = chunk.start + chunk.length == len(sequence.tokens)
    return range(chunk.length - 1, chunk.length) if reaches_end else range(0)
