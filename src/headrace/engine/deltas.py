"""The text of growing outputs in pieces, none of which is ever taken back. Knows no request and no wire."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headrace.checkpoint import Tokenizer
from headrace.core import SamplingParams
from headrace.engine.outputs import CompletionOutput, FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class Delta:
    """What one continuation has gained. `finish_reason` comes with the last one."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None


class DeltaReader:
    """Reads one continuation again and again while it grows: the texts of all deltas joined are its final text."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._stops = params.stop
        self._stream = tokenizer.open_stream(params.skip_special_tokens)
        self._tokens = 0
        self._characters = 0
        self._ended = False

    def read(self, output: CompletionOutput) -> Delta | None:
        """What is new since the last call; None if nothing is, or all has been said."""
        new = output.token_ids[self._tokens :]
        ended = output.finish_reason is not None
        if self._ended or not (new or ended):
            return None
        text = self._read_text(output, new)
        logprobs = None if output.logprobs is None else output.logprobs[self._tokens :]
        self._tokens += len(new)
        self._characters += len(text)
        self._ended = ended
        return Delta(output.index, text, new, logprobs, output.finish_reason)

    def _read_text(self, output: CompletionOutput, new: list[int]) -> str:
        if output.finish_reason is not None:
            return output.text[self._characters :]
        if self._stops:
            # The engine keeps the text itself, to look for stops in it.
            end = len(output.text) - count_held(output.text, self._stops)
            return output.text[self._characters : end]
        return "".join(map(self._stream.push, new))


def count_held(text: str, stops: Iterable[str]) -> int:
    """How many characters at the end of a text may turn out to be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
