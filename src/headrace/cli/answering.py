"""Where a chat's answers come from: a model in this process, or a server. Knows no conversation and no terminal."""

from __future__ import annotations

import http.client
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from types import FrameType
from typing import Any, Protocol

import msgspec

from headrace.cli.conversation import Message
from headrace.core import HeadraceError, InputError, Request, SamplingParams

# A server may have a queue; longer than this between two pieces is a server that hangs.
PATIENCE_SECONDS = 600.0
TOO_LONG_CODES = {"context_length", "context_length_exceeded"}


class TooLong(HeadraceError):
    """The messages leave too little of the context for an answer."""


class Answerer(Protocol):
    """A model that answers messages. Of the last answer: its `tokens`, and whether it was `cut` as no more could be."""

    name: str
    tokens: int
    cut: bool

    def stream(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]:
        """The answer in pieces, as they come. Raises TooLong before the first piece, HeadraceError, KeyboardInterrupt.

        After each of these the next answer may be asked for.
        """
        ...

    def close(self) -> None: ...


class LocalModel:
    """A model loaded into this process."""

    def __init__(self, model: str) -> None:
        from headrace.llm import LLM

        self.llm = LLM(model)
        self.name = f"{self.llm.model_name}, {self.llm.resolved['precision']}"
        self.tokens = 0
        self.cut = False

    def stream(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]:
        from headrace.engine.deltas import DeltaReader
        from headrace.engine.stream import speak

        plain = [msgspec.structs.asdict(message) for message in messages]
        tokenizer, context = self.llm.tokenizer, self.llm.context_length
        prompt = tuple(tokenizer.encode(tokenizer.render_chat(plain), special=False))
        length = len(prompt)
        # A history makes room for an answer; a single question may take all.
        room = min(params.max_tokens, context // 4) if len(messages) > 2 else 1
        if length + room > context:
            raise TooLong(f"the message makes a prompt of {length} tokens; the context holds {context}")
        engine, reader = self.llm.engine, DeltaReader(tokenizer, params)
        before = engine.counters.output_tokens
        try:
            with soft_interrupt() as asked:
                for piece in speak(engine, Request("0", prompt, params), reader):
                    yield piece
                    if asked.is_set():
                        raise KeyboardInterrupt
                # The last steps may have added no text: the end token, or what is left out of it.
                if asked.is_set():
                    raise KeyboardInterrupt
        finally:
            self.tokens = engine.counters.output_tokens - before
            self.cut = reader.finish_reason == "length"

    def close(self) -> None:
        self.llm.close()


@contextmanager
def soft_interrupt() -> Iterator[Event]:
    """Within it, the first Ctrl-C sets the event: the engine must not be left in the middle of a step.

    A second one raises KeyboardInterrupt.
    """
    asked = Event()

    def note(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            signal.default_int_handler(number, frame)
        asked.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


class Delta(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    delta: Delta
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    completion_tokens: int = 0


class Problem(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class Answer(msgspec.Struct):
    """What is read of an event of a stream, and of an error."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Problem | None = None


class Model(msgspec.Struct):
    id: str


class ModelList(msgspec.Struct):
    data: list[Model]


class Server:
    """A server with OpenAI's API at a URL such as http://127.0.0.1:8000/v1. Without a model, its first one."""

    def __init__(self, url: str, model: str | None, key: str | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--url must begin with http:// or https://, got {url!r}")
        self.url = url.rstrip("/")
        self.key = key
        self.tokens = 0
        self.cut = False
        self.name = model or self._find_model()

    def stream(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": messages,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if params.seed is not None:
            body["seed"] = params.seed
        self.tokens, self.cut = 0, False
        for event in self._read_events(body):
            if event.error is not None:
                raise HeadraceError(f"{self.url} ended the answer: {event.error.message or 'it did not say why'}")
            pieces = [choice.delta.content for choice in event.choices if choice.delta.content]
            # Until the server says how many tokens there were, a piece counts as one.
            self.tokens = event.usage.completion_tokens if event.usage else self.tokens + len(pieces)
            self.cut = self.cut or any(choice.finish_reason == "length" for choice in event.choices)
            yield from pieces

    def close(self) -> None:
        """Nothing is held between answers."""

    def _find_model(self) -> str:
        with self._open("/models") as response:
            try:
                models = msgspec.json.decode(response.read(), type=ModelList).data
            except msgspec.DecodeError as error:
                raise HeadraceError(f"{self.url}/models is not a list of models: {error}; is the URL right?") from None
        if not models:
            raise HeadraceError(f"{self.url} has no model")
        return models[0].id

    def _read_events(self, body: dict[str, Any]) -> Iterator[Answer]:
        with self._open("/chat/completions", body) as response:
            try:
                for line in response:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    yield msgspec.json.decode(data, type=Answer)
            except (OSError, http.client.HTTPException, msgspec.DecodeError) as error:
                raise HeadraceError(f"{self.url} broke off the answer: {name_error(error)}") from None
        raise HeadraceError(f"{self.url} broke off the answer")

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The response to a call. Raises TooLong, and HeadraceError for any other refusal."""
        data = None if body is None else msgspec.json.encode(body)
        try:
            request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
            if self.key is not None:
                # It must not follow a redirection to somebody else.
                request.add_unredirected_header("Authorization", f"Bearer {self.key}")
            return urllib.request.urlopen(request, timeout=PATIENCE_SECONDS)
        except urllib.error.HTTPError as error:
            raise self._describe(error) from None
        except urllib.error.URLError as error:
            raise HeadraceError(f"{self.url} cannot be reached: {error.reason}; is the server running?") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise HeadraceError(f"{self.url} cannot be reached: {name_error(error)}") from None

    def _describe(self, refusal: urllib.error.HTTPError) -> HeadraceError:
        try:
            problem = msgspec.json.decode(refusal.read(), type=Answer).error or Problem()
        except (OSError, http.client.HTTPException, msgspec.DecodeError):
            problem = Problem()
        if problem.code in TOO_LONG_CODES:
            return TooLong(problem.message)
        hints = {
            401: "give its key in a file with --key-file" if self.key is None else "the key in --key-file is not right",
            404: "is the URL right? It usually ends in /v1",
        }
        words = [problem.message or f"HTTP {refusal.code} {refusal.reason}", hints.get(refusal.code, "")]
        return HeadraceError(f"{self.url} refused: " + "; ".join(word for word in words if word))


def name_error(error: Exception) -> str:
    return str(error) or type(error).__name__
