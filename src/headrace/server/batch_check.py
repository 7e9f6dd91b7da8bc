"""Whether a file of rows is a batch that can run: every line is looked at before the first one is answered.

All or nothing, as OpenAI's service does it. What only the engine can say, such as a prompt that is too long, is an
error of its row later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from headrace.core import RowError
from headrace.job.batch_rows import LINE_FIELDS
from headrace.job.drafts import Drafter
from headrace.job.sources import JsonLines, Row
from headrace.server.batch_object import MOST_ERRORS, BatchError
from headrace.server.errors import ApiError, find_param

MOST_ROWS = 50_000
# Lines and bodies, some milliseconds of work, between two pauses in which other threads have Python to themselves.
MANY_LINES, MANY_BODIES = 256, 16
# The served name of the model that a row names, or of the first where it names none. Raises ApiError for another.
FindModel = Callable[[str | None], str]


@dataclass(slots=True)
class Findings:
    """What was found: rows, the model that they name, and what is wrong, at most MOST_ERRORS of it."""

    rows: int = 0
    model: str | None = None
    errors: list[BatchError] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)

    def add(self, code: str, message: str, line: int | None = None, param: str | None = None) -> None:
        if len(self.errors) < MOST_ERRORS:
            self.errors.append(BatchError(code, message, line, param))


def check_lines(path: Path, endpoint: str, find_model: FindModel, pause: Callable[[], None]) -> Findings:
    """Check lines, ids, endpoints and models.

    `pause` is called every now and then, and may raise what ends the check.
    """
    found, line = Findings(), 0
    for row in JsonLines(path).rows():
        if row.index % MANY_LINES == 0:
            pause()
        if row.index >= MOST_ROWS:
            found.add("too_many_rows", f"the file holds more than {MOST_ROWS:,} rows: make several batches of it")
            break
        if row.line > line + 1:
            found.add("blank_line", "the line is blank: each line must be a JSON object", line + 1)
        line, found.rows = row.line, row.index + 1
        try:
            check_row(row, endpoint, find_model, found)
        except RowError as error:
            found.add(error.code, str(error), row.line, find_param(str(error)))
    if not found.rows:
        found.add("empty_file", "the file holds no rows")
    return found


def check_row(row: Row, endpoint: str, find_model: FindModel, found: Findings) -> None:
    """Raises RowError for what is wrong with a row beside the others."""
    if row.error is not None:
        raise row.error
    value = row.value or {}
    for name in LINE_FIELDS:
        if name not in value:
            raise RowError("missing_field", f"the row has no {name}")
    name, body = value["custom_id"], value["body"]
    if isinstance(name, str) and found.names.setdefault(name, row.line) != row.line:
        first = found.names[name]
        raise RowError("duplicate_custom_id", f"custom_id {name!r:.80} is that of line {first} already")
    if value["url"] != endpoint:
        raise RowError("mismatched_url", f"url is {value['url']!r:.80}; the batch is for {endpoint}")
    asked = body.get("model") if isinstance(body, dict) else None
    if not isinstance(asked, str | None):
        raise RowError("invalid_value", f"body.model must be a text, got {asked!r:.80}")
    try:
        model = find_model(asked)
    except ApiError as error:
        raise RowError(error.code, f"body.{error}") from None
    found.model = found.model or model
    if model != found.model:
        raise RowError("mismatched_model", f"body.model means {model!r:.80}; the rows before name {found.model!r:.80}")


def check_bodies(path: Path, drafter: Drafter, found: Findings, pause: Callable[[], None]) -> None:
    """Check everything that a body says; for a file that `check_lines` has found right."""
    for row in JsonLines(path).rows():
        if row.index % MANY_BODIES == 0:
            pause()
        try:
            drafter.draft(row, drafter.name(row))
        except RowError as error:
            found.add(error.code, str(error), row.line, find_param(str(error)))
