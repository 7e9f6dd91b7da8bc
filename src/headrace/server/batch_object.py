"""Files and batches as they are kept and as OpenAI shows them. Knows no row, no disk and no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
Ending = Literal["completed", "expired", "cancelled", "failed"]
# Statuses of batches that something will still happen to.
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
MOST_ERRORS = 100


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """A file's description. `owner` is the name of the key that brought it, "" where there are no keys."""

    id: str
    owner: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None = None

    def describe(self) -> dict[str, Any]:
        """As OpenAI shows it."""
        shown = {name: value for name, value in msgspec.structs.asdict(self).items() if name != "owner"}
        return {"id": self.id, "object": "file", **shown, "status": "processed", "status_details": None}


class BatchError(msgspec.Struct, frozen=True):
    """Why a batch failed: `line` is the input's, from 1; `param` the field that is wrong."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch. Times are Unix seconds. `ending` is what a finalizing batch will be; `keep_seconds` how long its output
    files are kept, None for ever."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: int
    status: Status = "validating"
    ending: Ending = "completed"
    model: str | None = None
    errors: tuple[BatchError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    times: dict[str, int] = {}
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    metadata: dict[str, str] | None = None
    keep_seconds: int | None = None

    @property
    def unfinished(self) -> bool:
        return self.status in UNFINISHED

    def become(self, status: Status, now: int, **changes: Any) -> Batch:
        """The batch with a new status, which it has from `now` on."""
        times = self.times | {f"{status}_at": now}
        return msgspec.structs.replace(self, status=status, times=times, **changes)

    def describe(self) -> dict[str, Any]:
        """As OpenAI shows it."""
        moments = ("finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": describe_errors(self.errors),
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "in_progress_at": self.times.get("in_progress_at"),
            "expires_at": self.expires_at,
            **{f"{status}_at": self.times.get(f"{status}_at") for status in moments},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": describe_usage(self.input_tokens, self.output_tokens),
            "metadata": self.metadata,
        }


def describe_errors(errors: tuple[BatchError, ...]) -> dict[str, Any] | None:
    if not errors:
        return None
    return {"object": "list", "data": [msgspec.structs.asdict(error) for error in errors]}


def describe_usage(input_tokens: int, output_tokens: int) -> dict[str, Any]:
    """Tokens of all answered rows. Which of them were found in the cache depends on the rows around and is not kept."""
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": input_tokens + output_tokens,
    }


def describe_page(objects: list[Mapping[str, Any]], more: bool) -> dict[str, Any]:
    """One page of a list, as OpenAI shows it."""
    first, last = (objects[0]["id"], objects[-1]["id"]) if objects else (None, None)
    return {"object": "list", "data": objects, "first_id": first, "last_id": last, "has_more": more}
