"""The text of growing outputs in pieces, none of which is ever taken back. Knows no request and no wire."""

from __future__ import annotations

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
    """Reads one continuation again and again while it grows: the texts of all deltas joined are its final text.

    `finish_reason` is None until it has ended.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._stops = [StopBeginning(stop) for stop in params.stop]
        self._seen = 0
        self._stream = tokenizer.open_stream(params.skip_special_tokens)
        self._tokens = 0
        self._characters = 0
        self.finish_reason: FinishReason | None = None

    def read(self, output: CompletionOutput) -> Delta | None:
        """What is new since the last call; None if nothing is, or all has been said."""
        new = output.token_ids[self._tokens :]
        ended = output.finish_reason is not None
        if self.finish_reason is not None or not (new or ended):
            return None
        text = self._read_text(output, new)
        logprobs = None if output.logprobs is None else output.logprobs[self._tokens :]
        self._tokens += len(new)
        self._characters += len(text)
        self.finish_reason = output.finish_reason
        return Delta(output.index, text, new, logprobs, output.finish_reason)

    def _read_text(self, output: CompletionOutput, new: list[int]) -> str:
        if output.finish_reason is not None:
            return output.text[self._characters :]
        if self._stops:
            # The engine keeps the text itself, to look for stops in it.
            for stop in self._stops:
                stop.read(output.text[self._seen :])
            self._seen = len(output.text)
            return output.text[self._characters : self._seen - max(stop.length for stop in self._stops)]
        return "".join(map(self._stream.push, new))


class StopBeginning:
    """How many characters at the end of a growing text may turn out to be the beginning of a stop string: `length`.

    The search of Knuth, Morris and Pratt, whose work grows as the text does, however long the stop string is.
    """

    def __init__(self, stop: str) -> None:
        self.length = 0
        self._stop = stop
        # By length, for the beginnings met so far: the longest shorter beginning with which each of them ends.
        self._shorter = [0, 0]

    def read(self, text: str) -> None:
        """Go on over what the text has gained."""
        for character in text:
            self.length = self._extend(self.length, character)
            if self.length == len(self._shorter):
                self._shorter.append(self._extend(self._shorter[-1], self._stop[self.length - 1]))
            if self.length == len(self._stop):
                # It stands there whole, and the engine went on: nothing of it is to be held for its own sake.
                self.length = self._shorter[self.length]

    def _extend(self, length: int, character: str) -> int:
        """The longest beginning with which a text ends that ended with one of `length` before this character."""
        while length and self._stop[length] != character:
            length = self._shorter[length]
        return length + (self._stop[length] == character)
