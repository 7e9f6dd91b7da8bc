"""What a run has done so far, counted where it happens. Knows no tensor, no clock and no file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class StoreCounts:
    """KV blocks that went to disk and came back. `tokens_restored` were found there and so not computed; `refused` are
    blocks whose bytes were not those that had been written."""

    blocks_written: int = 0
    bytes_written: int = 0
    blocks_read: int = 0
    bytes_read: int = 0
    blocks_refused: int = 0
    tokens_restored: int = 0


@dataclass(slots=True)
class Counters:
    """Counts of one engine since it was made. Tokens are counted once a continuation, so n=4 counts a prompt 4 times.

    prompt_tokens = cached_prompt_tokens + computed_prompt_tokens. Tokens computed a second time, after a preemption,
    count in recomputed_tokens alone. Bytes are of the KV cache. What came back from disk counts as cached, too.
    """

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    recomputed_tokens: int = 0
    output_tokens: int = 0
    kv_bytes_per_token: int = 0
    kv_used_bytes: int = 0
    kv_peak_bytes: int = 0
    kv_budget_bytes: int = 0
    kv_store: StoreCounts = field(default_factory=StoreCounts)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
