"""Parts of answers that rows of a job do not have: usage with details, log probabilities of an echoed prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from headrace.engine.outputs import RequestOutput
from headrace.job.bodies import completion_logprobs, read_text
from headrace.job.records import Decode, spell_logprobs


def count_usage(outputs: Iterable[RequestOutput]) -> dict[str, Any]:
    """OpenAI's `usage`: a prompt counts once, however many answers it has."""
    outputs = list(outputs)
    prompt = sum(len(each.prompt_token_ids) for each in outputs)
    completion = sum(len(choice.token_ids) for each in outputs for choice in each.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in outputs)},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def echo_logprobs(output: RequestOutput, decode: Decode) -> dict[str, Any]:
    """Log probabilities of a prompt's own tokens; the first has none."""
    known = [each for each in output.prompt_logprobs or [] if each is not None]
    found = completion_logprobs(spell_logprobs(known, decode), 0)
    first = read_text(decode(output.prompt_token_ids[0]))
    return {
        "tokens": [first, *found["tokens"]],
        "token_logprobs": [None, *found["token_logprobs"]],
        "top_logprobs": [None, *found["top_logprobs"]],
        "text_offset": [0, *(offset + len(first) for offset in found["text_offset"])],
    }


def join_logprobs(first: Mapping[str, Any], second: Mapping[str, Any] | None) -> dict[str, Any]:
    """The older form of a text's two parts as one."""
    return {name: [*values, *(second[name] if second else [])] for name, values in first.items()}
