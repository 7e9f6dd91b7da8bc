"""LLM: a model in memory and the calls that use it: generate, chat, stream, score."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cached_property, lru_cache
from threading import Lock
from types import TracebackType
from typing import Any, Literal, Self, cast, get_args

from headrace.checkpoint import open_checkpoint
from headrace.checkpoint.pooling import read_pooling
from headrace.core import InputError, Pooling, Request, RowError, SamplingParams
from headrace.engine.deltas import DeltaReader
from headrace.engine.engine import Engine
from headrace.engine.loading import change_kv, load_engine
from headrace.engine.memory import give_back_memory
from headrace.engine.outputs import RequestOutput, ScoreOutput
from headrace.engine.reading import read_score
from headrace.engine.stream import Asked, answer, speak
from headrace.meter.bar import show_progress
from headrace.meter.report import describe_run
from headrace.options import DEFAULT_MODEL, EngineOptions
from headrace.schedule.prefixes import pack

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
CLOSED = "this LLM is closed: make a new one"
BUSY = "another stream of this LLM is unfinished: read it to its end or close it first"


class LLM:
    """A language model, ready to answer piles of prompts.

    Keywords are the fields of EngineOptions. Use it as a context manager, or call `close`, to free its memory.
    Raises ValueError for a wrong argument, ModelError or InputError for a model or a setting that cannot be used.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        precision: Literal["auto", "fp32", "bf16", "int8", "int4"] = "auto",
        kv_cache_bytes: int | None = None,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        known = {field.name for field in fields(EngineOptions)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise InputError(f"LLM has no setting {unknown[0]!r}; the settings are {', '.join(sorted(known))}")
        asked = EngineOptions(
            model=model, precision=precision, kv_cache_bytes=kv_cache_bytes, threads=threads, **options
        )
        began = time.perf_counter()
        loaded = load_engine(asked)
        self.options, self.engine, self.tokenizer = loaded.options, loaded.engine, loaded.tokenizer
        self.model_name, self.model_hash = loaded.model_name, loaded.model_hash
        self.resolved = loaded.resolved
        self.load_seconds = time.perf_counter() - began
        self.run_seconds = 0.0
        # Held while a stream is read.
        self._stream_lock = Lock()
        # What a token adds to a text, in UTF-8.
        self.token_bytes = lru_cache(maxsize=65536)(self.tokenizer.token_bytes)

    @cached_property
    def pooling(self) -> Pooling:
        """How the model's own configuration makes one vector of a text."""
        return read_pooling(open_checkpoint(self.options.model).path)

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its output together."""
        return self._require_open().context_length

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt (text, or token ids); answers in the order of the prompts.

        params is one for all or one a prompt. A prompt that cannot be answered, too long for instance, comes back with
        `.error` set and no outputs; the others are not touched by it. On a terminal, work of more than two seconds
        shows its progress.
        """
        return self._answer(as_list(prompts), params, progress, self._tokens)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer each conversation (a list of {"role": ..., "content": ...}) through the model's chat template.

        One that the template refuses comes back with `.error` set, as `generate` has it.
        """
        several = [conversations] if conversations and isinstance(conversations[0], Mapping) else conversations
        return self._answer(cast(Sequence[Any], several), params, progress, self._render)

    def stream(
        self, prompts: Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[RequestOutput]:
        """Like generate, but each answer comes as soon as it is finished; `request_id` is the prompt's place.

        Of prompts in a list as many are read at once as `window_bytes` hold, to be planned together; any other iterable
        is read only as far ahead as will run soon. Leaving the loop early drops the rest. One call at a time: raises
        ValueError while another stream of this LLM is unfinished.
        """
        return self._stream(prompts, params, self._tokens)

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[str]:
        """The answer to one conversation, in pieces of text as they come. One call at a time, as `stream`.

        Raises RowError for a conversation that cannot be answered, as when it is too long.
        """
        self._require_ready()
        params = params or SamplingParams()
        if params.n != 1:
            raise InputError(f"stream_chat gives one answer: n must be 1, got {params.n}")
        request = Request("0", tuple(self._render(messages)), params)
        return self._speak(request, DeltaReader(self.tokenizer, params))

    def embed(
        self, texts: Prompt | Sequence[Prompt], pooling: Pooling | None = None, *, progress: bool = True
    ) -> list[list[float]]:
        """One vector of length 1 for each text, [hidden size]: the mean of its tokens' last hidden states, or the last
        token's; as the model's configuration says if `pooling` is not given.

        Raises ValueError for a text that is empty or longer than the context.
        """
        self._require_ready()
        if pooling not in (None, *get_args(Pooling)):
            raise InputError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
        texts = as_list(texts)
        requests = self._requests(texts, SamplingParams(max_tokens=1), self._tokens, embed=pooling or self.pooling)
        answers = {each.request_id: each for each in show_progress(self._run(requests), len(texts), progress)}
        for place in range(len(texts)):
            if (error := answers[str(place)].error) is not None:
                raise InputError(f"text {place} cannot be embedded: {error}")
        return [answers[str(place)].embedding or [] for place in range(len(texts))]

    def score(self, texts: Prompt | Sequence[Prompt], *, progress: bool = True) -> list[ScoreOutput]:
        """Log probability of every token of each text under the model, and the text's perplexity.

        Raises ValueError for a text that is empty or longer than the context.
        """
        self._require_ready()
        texts = as_list(texts)
        requests = self._requests(texts, SamplingParams(max_tokens=1), self._tokens, score=True)
        answers = {each.request_id: each for each in show_progress(self._run(requests), len(texts), progress)}
        return [read_score(answers[str(place)], self.tokenizer) for place in range(len(texts))]

    def report(self) -> dict[str, Any]:
        """What all calls of this LLM did so far, as `headrace run` writes it into its report."""
        engine = self._require_open()
        return describe_run(
            engine.counters,
            engine.meter,
            self.load_seconds,
            self.run_seconds,
            self.resolved,
            self.model_hash,
        )

    def use_kv(self, kv: str, block_size: int) -> None:
        """Keep keys and values by this policy from now on, in as much memory; what was cached is forgotten.

        Raises InputError for a policy that cannot serve the model, ValueError while a request is unfinished.
        """
        memory = self.resolved["kv_cache_bytes"]
        asked = replace(self.options, kv=kv, block_size=block_size, kv_cache_bytes=memory)
        options = change_kv(self._require_open(), asked)
        self.options = replace(options, kv_cache_bytes=self.options.kv_cache_bytes)
        self.resolved |= {"kv": options.kv, "block_size": block_size}

    def close(self) -> None:
        """Free the model and the KV cache. The LLM cannot be used after it."""
        if "engine" in self.__dict__:
            self.__dict__.pop("engine").close()
            give_back_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> Engine:
        if "engine" not in self.__dict__:
            raise InputError(CLOSED)
        return self.engine

    def _require_ready(self) -> None:
        self._require_open()
        if self._stream_lock.locked():
            raise InputError(BUSY)

    @contextmanager
    def _claim(self) -> Iterator[Engine]:
        """The engine for one stream, while it is read. Raises InputError while another one is."""
        engine = self._require_open()
        if not self._stream_lock.acquire(blocking=False):
            raise InputError(BUSY)
        began = time.perf_counter()
        try:
            yield engine
        finally:
            self.run_seconds += time.perf_counter() - began
            self._stream_lock.release()

    def _render(self, messages: Sequence[Message]) -> list[int]:
        text = self.tokenizer.render_chat([dict(message) for message in messages])
        return self.tokenizer.encode(text, special=False)

    def _tokens(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, str):
            return pack(self.tokenizer.encode(prompt))
        if all(isinstance(token, int) for token in prompt):
            return tuple(prompt)
        raise InputError(f"a prompt must be a text or a list of token ids, got {prompt!r:.80}")

    def _answer(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
        read: Callable[[Any], Sequence[int]],
    ) -> list[RequestOutput]:
        stream = show_progress(self._stream(prompts, params, read), len(prompts), progress)
        answers = {output.request_id: output for output in stream}
        return [answers[str(index)] for index in range(len(prompts))]

    def _stream(
        self,
        prompts: Iterable[Any],
        params: SamplingParams | Sequence[SamplingParams] | None,
        read: Callable[[Any], Sequence[int]],
    ) -> Iterator[RequestOutput]:
        self._require_ready()
        params = params if params is not None else SamplingParams()
        if not isinstance(params, SamplingParams) and isinstance(prompts, Sequence) and len(params) != len(prompts):
            raise InputError(
                f"params must be one for all or one a prompt: got {len(params)} for {len(prompts)} prompts"
            )
        return self._run(self._requests(prompts, params, read), lazy=not isinstance(prompts, Sequence))

    def _requests(
        self,
        prompts: Iterable[Any],
        params: SamplingParams | Sequence[SamplingParams],
        read: Callable[[Any], Sequence[int]],
        score: bool = False,
        embed: Pooling | None = None,
    ) -> Iterator[Asked]:
        """`read` makes tokens of a prompt; one of which it raises RowError has none."""
        for index, prompt in enumerate(prompts):
            if not isinstance(params, SamplingParams) and index == len(params):
                raise InputError(f"params must be one for all or one a prompt: there are more than {index} prompts")
            own = params if isinstance(params, SamplingParams) else params[index]
            tokens: Sequence[int] = ()
            error = None
            try:
                tokens = read(prompt)
            except RowError as refused:
                error = refused
            text = prompt if isinstance(prompt, str) else None
            yield Asked(Request(str(index), tokens, own, score, embed), text, error)

    def _speak(self, request: Request, reader: DeltaReader) -> Iterator[str]:
        with self._claim() as engine:
            yield from speak(engine, request, reader)

    def _run(self, requests: Iterator[Asked], lazy: bool = False) -> Iterator[RequestOutput]:
        with self._claim() as engine:
            yield from answer(engine, requests, lazy)


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list. Raises ValueError for anything else."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InputError(f"prompts must be a text, a list of texts or lists of token ids, got {type(prompts).__name__}")
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
