"""From hidden states to the next tokens. Most rows want the likeliest one alone, and their logits are never written.

Which way a row takes changes no bit of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Rows

from torch import Tensor

from headrace.core import RowError
from headrace.engine.generation import Generation
from headrace.engine.sampling import SampledToken, fail_unordered, sample
from headrace.model import Model

# Logit rows computed at once: bounds their memory.
LOGIT_ROWS = 256


def choose_tokens(
    model: Model, hidden: Tensor, generations: Rows[Generation], end_tokens: frozenset[int]
) -> list[SampledToken | RowError]:
    """The next token of each generation from its hidden state [R, H]; an error for a row that `sample` would fail."""
    tokens: list[SampledToken | RowError] = [(0, None)] * len(generations)
    for part in cut([row for row, generation in enumerate(generations) if generation.plain]):
        for row, likeliest in zip(part, model.find_likeliest(take(hidden, part)).tolist(), strict=True):
            tokens[row] = (likeliest, None) if likeliest >= 0 else fail_unordered(generations[row])
    for part in cut([row for row, generation in enumerate(generations) if not generation.plain]):
        found = sample(model.logits(take(hidden, part)), [generations[row] for row in part], end_tokens)
        for row, token in zip(part, found, strict=True):
            tokens[row] = token
    return tokens


def cut(rows: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(rows), LOGIT_ROWS):
        yield rows[start : start + LOGIT_ROWS]


def take(hidden: Tensor, rows: list[int]) -> Tensor:
    """These rows, in ascending order; without copying if they are all."""
    return hidden if len(rows) == hidden.shape[0] else hidden[rows]
