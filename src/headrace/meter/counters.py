"""What a run has done so far, counted where it happens. Knows no tensor, no clock and no file."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    """Counts of one engine since it was made. Tokens are counted once a continuation, so n=4 counts a prompt 4 times.

    prompt_tokens = cached_prompt_tokens + computed_prompt_tokens. Tokens computed a second time, after a preemption,
    count in recomputed_tokens alone. Bytes are of the KV cache.
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

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
