"""A sample of a job's rows as requests, the same whenever it is drawn. Knows no engine."""

from __future__ import annotations

from contextlib import suppress

from headrace.checkpoint import Tokenizer
from headrace.core import Request, RowError
from headrace.job.drafts import Drafter, encode_drafts, make_request
from headrace.job.sources import Row, Source

SAMPLE_ROWS = 16
# Prompt tokens of a sample, so that it takes seconds and not minutes.
SAMPLE_TOKENS = 16_384
# A sample of long prompts is not thinned below this.
LEAST_ROWS = 3


def choose_places(rows: int) -> list[int]:
    """Rows of the sample, from 0, spread evenly over a file of so many."""
    count = min(SAMPLE_ROWS, rows)
    return [(2 * number + 1) * rows // (2 * count) for number in range(count)]


def draw_sample(source: Source, rows: int, drafter: Drafter, tokenizer: Tokenizer, context: int) -> list[Request]:
    """Requests of the sampled rows that can be answered, fewer of them where prompts are long."""
    places = choose_places(rows)
    requests = []
    for row in source.rows():
        if row.index in places:
            # What is wrong with a row the job itself says.
            with suppress(RowError):
                request = read_row(row, drafter, tokenizer, context)
                # Of a row that only wants a vector no answer can be lost.
                requests += [request] if request.generates else []
        if row.index >= places[-1]:
            break
    while sum(len(each.prompt_token_ids) for each in requests) > SAMPLE_TOKENS and len(requests) >= 2 * LEAST_ROWS:
        requests = requests[::2]
    return requests


def read_row(row: Row, drafter: Drafter, tokenizer: Tokenizer, context: int) -> Request:
    if row.error is not None:
        raise row.error
    draft = drafter.draft(row, drafter.name(row))
    return make_request(draft, encode_drafts([draft], tokenizer)[0], context)
