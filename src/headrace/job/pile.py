"""The rows of a file as tasks for the simulator: their tokens, and how many more they are expected to get.

Loads no weights. Rows are understood as `headrace run` understands them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

from headrace.checkpoint import Tokenizer
from headrace.core import Request, RowError
from headrace.job.drafts import Draft, Drafter, encode_drafts, make_request, share_key
from headrace.job.sources import Row
from headrace.plan.simulator import Task

ROWS_A_CALL = 256


@dataclass(slots=True)
class Pile:
    """Rows read: `failed` ones get an error for an answer, `equal` ones another row's, each of the others is a task.

    outputs_known: every task's output is exactly as long as it is said to be.
    """

    tasks: list[Task] = field(default_factory=list)
    failed: int = 0
    equal: int = 0
    outputs_known: bool = True

    @property
    def rows(self) -> int:
        return len(self.tasks) + self.failed + self.equal


class Expectation:
    """How many tokens a request will generate: the most that it may where nothing can end it sooner, the mean of the
    choices where it must choose, else what the user expects, else the most that it may."""

    def __init__(self, tokenizer: Tokenizer, expected: int | None = None) -> None:
        self.expected = expected
        self._look = lru_cache(maxsize=1024)(lambda choices: count_choice(choices, tokenizer))

    def look(self, request: Request) -> tuple[int, bool]:
        """Tokens, and whether that is certain."""
        params = request.params
        if not request.generates:
            return 0, True
        if params.ignore_eos and params.constraint is None and not params.stop and not params.stop_token_ids:
            return params.max_tokens, True
        if params.constraint is not None and params.constraint.kind == "choice":
            mean, certain = self._look(params.constraint.value)
            return min(params.max_tokens, mean), certain
        return min(params.max_tokens, self.expected or params.max_tokens), False


def count_choice(choices: str, tokenizer: Tokenizer) -> tuple[int, bool]:
    """The mean length in tokens of a JSON list of texts, and whether that is certain: a model may say a word that is a
    token in several smaller ones, and cannot for a single byte only."""
    texts = json.loads(choices)
    lengths = [len(tokenizer.encode(text, special=False)) for text in texts]
    return max(1, round(sum(lengths) / len(lengths))), all(len(text.encode()) == 1 for text in texts)


def make_pile(requests: Iterable[Request], expectation: Expectation) -> Pile:
    """Requests, which are all different, as a pile."""
    pile = Pile()
    for request in requests:
        add_task(pile, request, expectation)
    return pile


def read_pile(
    rows: Iterator[Row],
    drafter: Drafter,
    tokenizer: Tokenizer,
    context_length: int,
    expectation: Expectation,
    tell: Callable[[int], None],
) -> Pile:
    """All rows of a file; `tell` hears how many have been read."""
    pile = Pile()
    names: set[str] = set()
    keys: set[bytes] = set()
    while part := list(islice(rows, ROWS_A_CALL)):
        drafts: list[Draft] = []
        for row in part:
            draft = understand(row, drafter, names)
            if draft is None:
                pile.failed += 1
            else:
                drafts.append(draft)
        for draft, tokens in zip(drafts, encode_drafts(drafts, tokenizer), strict=True):
            try:
                request = make_request(draft, tokens, context_length)
            except RowError:
                pile.failed += 1
                continue
            key = share_key(request, draft.format)
            if key is not None and key in keys:
                pile.equal += 1
                continue
            if key is not None:
                keys.add(key)
            add_task(pile, request, expectation)
        tell(pile.rows)
    return pile


def understand(row: Row, drafter: Drafter, names: set[str]) -> Draft | None:
    """A row's draft; None where it would fail."""
    try:
        if row.error is not None:
            raise row.error
        name = drafter.name(row)
        if drafter.named and name in names:
            return None
        names.add(name)
        return drafter.draft(row, name)
    except RowError:
        return None


def add_task(pile: Pile, request: Request, expectation: Expectation) -> None:
    output, certain = expectation.look(request)
    pile.tasks.append(Task(request, output))
    pile.outputs_known &= certain
