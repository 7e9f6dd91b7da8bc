"""Whether a request can ever run in so much KV memory. What the engine refuses, a forecast refuses too."""

from __future__ import annotations

from headrace.cache.layout import CacheLayout
from headrace.core import Request, RowError


def check_request(request: Request, layout: CacheLayout, num_blocks: int, context_length: int) -> None:
    """Raise RowError for a prompt that is empty, or longer than the context, and where prompt and output could need
    more blocks than there are: by the most that it may generate, not by what it will."""
    length = len(request.prompt_token_ids)
    if length == 0:
        raise RowError("empty_prompt", "the prompt has no tokens")
    if length + request.generates > context_length:
        raise RowError("context_length", f"the prompt has {length} tokens; the context holds {context_length}")
    most = min(length + (request.params.max_tokens if request.generates else 0), context_length)
    needed = layout.blocks_for(most, prompt=length)
    if needed > num_blocks:
        raise RowError(
            "kv_memory",
            f"prompt and output of {most} tokens need {needed} KV blocks and the budget holds {num_blocks}: "
            "raise kv_cache_bytes or lower max_tokens",
        )
