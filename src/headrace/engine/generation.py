"""One continuation while it grows: its text, its stop conditions, its randomness, its log probabilities."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b

from torch import Tensor

from headrace.checkpoint import Tokenizer
from headrace.core import RowError, Sequence
from headrace.engine.outputs import CompletionOutput, FinishReason, TokenLogprob
from headrace.engine.structure import Matcher


@dataclass(slots=True)
class Reading:
    """What has been read of a prompt: log probabilities of its tokens, or `vector`, in which the first `pooled` are."""

    logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    vector: Tensor | None = None
    pooled: int = 0


class Generation:
    """Owns what a sequence has said; the sequence itself only knows token ids.

    `reached` is how many leading tokens a step was to bring into the cache, None before the first admission. Randomness
    comes from a counter keyed by the request's own seed and the choice, else by the engine's seed, the request's id and
    the choice, so that a row draws the same numbers alone, in any batch, after a preemption and after a restart.
    """

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, seed: int, matcher: Matcher | None) -> None:
        params = sequence.request.params
        self.sequence = sequence
        self.matcher = matcher
        self.tokenizer = tokenizer
        self.counts: Counter[int] = Counter()
        self.output = CompletionOutput(sequence.index, "", [], None if params.logprobs is None else [])
        self.reading = Reading()
        self.error: RowError | None = None
        self.reached: int | None = None
        name = f"{seed}\0{sequence.request.id}" if params.seed is None else f"{params.seed}\0"
        self._key = blake2b(f"{name}\0{sequence.index}".encode(), digest_size=32).digest()
        self._stream = tokenizer.open_stream(params.skip_special_tokens) if params.stop else None

    def draw_uniform(self) -> float:
        """The next number of this continuation's own random sequence, in [0, 1)."""
        position = len(self.output.token_ids).to_bytes(8, "little")
        digest = blake2b(position, key=self._key, digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def reach(self, start: int, end: int) -> int:
        """Tokens from start to end have their KV: how many of the prompt's had none before, now or ever."""
        prompt, reached = self.sequence.prompt_length, self.reached or 0
        self.reached = max(reached, end)
        return max(0, min(end, prompt) - max(start, min(reached, prompt)))

    @property
    def below_minimum(self) -> bool:
        return len(self.output.token_ids) < self.sequence.request.params.min_tokens

    @property
    def plain(self) -> bool:
        """Whether its next token is the likeliest one and nothing else is asked of the logits."""
        params = self.sequence.request.params
        changed = params.repetition_penalty != 1.0 or bool(params.logit_bias) or self.below_minimum
        changed = changed or bool(params.presence_penalty or params.frequency_penalty)
        return params.greedy and params.logprobs is None and self.matcher is None and not changed

    def append(self, token: int, logprob: TokenLogprob | None, room: int) -> bool:
        """Take the next token; `room` is how many more the context allows after it. True when this was the last one.

        The end token and stop tokens stay in token_ids, and out of the text. A stop string is cut from the text
        unless it is asked for.
        """
        params = self.sequence.request.params
        may_stop = len(self.output.token_ids) + 1 >= params.min_tokens
        self.output.token_ids.append(token)
        self.sequence.tokens.append(token)
        self.counts[token] += 1
        if self.output.logprobs is not None and logprob is not None:
            self.output.logprobs.append(logprob)
        complete = self.matcher is not None and self.matcher.consume(token)
        if token in self.tokenizer.eos_token_ids and not params.ignore_eos:
            return self._finish("stop", None, drop_last=True)
        if token in params.stop_token_ids and may_stop:
            return self._finish("stop", token, drop_last=not params.include_stop_str_in_output)
        if self._stream is not None:
            found = self._find_stop(self._stream.push(token))
            if found is not None and may_stop:
                return self._cut(*found)
        if complete:
            return self._finish("stop", None)
        if len(self.output.token_ids) >= params.max_tokens or room <= 0:
            return self._finish("length", None)
        return False

    def abort(self) -> None:
        self._finish("abort", None)

    def _find_stop(self, new_text: str) -> tuple[int, str] | None:
        """Add text; where the first stop string stands in it that ends in what was added, token borders or not.

        Those that ended before were passed over, being too early, and their text may have been sent.
        """
        before = len(self.output.text)
        self.output.text += new_text
        stops = self.sequence.request.params.stop
        places = ((self.output.text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in stops)
        return min((place for place in places if place[0] >= 0), default=None)

    def _cut(self, at: int, stop: str) -> bool:
        end = at + len(stop) if self.sequence.request.params.include_stop_str_in_output else at
        self.output.text = self.output.text[:end]
        self.output.finish_reason, self.output.stop_reason = "stop", stop
        return True

    def _finish(self, reason: FinishReason, stop_reason: int | None, drop_last: bool = False) -> bool:
        tokens = self.output.token_ids[:-1] if drop_last else self.output.token_ids
        self.output.text = self.tokenizer.decode(tokens, self.sequence.request.params.skip_special_tokens)
        self.output.finish_reason, self.output.stop_reason = reason, stop_reason
        return True
