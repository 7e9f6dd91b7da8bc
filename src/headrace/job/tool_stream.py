"""Calls of tools read out of text that is still growing. Knows where calls may stand, not what tools there are.

A call is an object with a `name` and, as `arguments` or `parameters`, an object. It counts as soon as its name and the
beginning of its arguments are read, since from then on they are handed on as they come: the arguments are the model's
own text, and end where the text breaks off. Until then anything that cannot become a call is text again.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass

from headrace.job.tools import NAME

ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is JSON text as the model wrote it; only a grammar makes sure that it is whole and valid."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer that is no part of a call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """The answer's call number `index`, from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Event = Text | CallStarted | Arguments
Steps = Generator[None, None, None]


@dataclass(frozen=True, slots=True)
class Marks:
    """The texts around calls; `close` may be empty. `bare` calls may also open an answer without a mark."""

    open: str
    close: str
    bare: bool = False


class Malformed(Exception):
    """What is being read cannot become a call."""


class ToolStream:
    """Turns an answer's text, as it comes, into events. Text between calls that is only space is left out, and so are
    all calls but the first unless they may be `parallel`.

    The reading is written as if the whole text were there: its generators pause wherever the text runs out.
    """

    def __init__(self, marks: Marks, parallel: bool = True) -> None:
        self.marks = marks
        self.parallel = parallel
        self._text = ""  # from the last point that reading may have to go back to
        self._at = 0
        self._ended = False
        self._calls = 0
        self._blank = ""
        self._speaking = False
        self._events: list[Event] = []
        self._steps = self._read()

    def push(self, text: str, last: bool = False) -> list[Event]:
        """What is certain now that `text` has come; with `last` nothing will follow and nothing is held back."""
        self._text += text
        self._ended = self._ended or last
        self._events = []
        next(self._steps, None)
        return [each for each in self._events if self.parallel or isinstance(each, Text) or each.index == 0]

    def _read(self) -> Steps:
        if self.marks.bare:
            yield from self._read_calls()
        while (yield from self._read_text()):
            self._at = len(self.marks.open)
            if not (yield from self._read_calls()):
                self._say(len(self.marks.open))
        if self._blank and not self._calls:
            self._events.append(Text(self._blank))

    def _read_text(self) -> Generator[None, None, bool]:
        """Hand text on up to an opening mark; False when the text ends without one."""
        while True:
            place = self._text.find(self.marks.open)
            held = 0 if self._ended else overlap(self._text, self.marks.open)
            self._say(len(self._text) - held if place < 0 else place)
            if place >= 0 or self._ended:
                return place >= 0
            yield

    def _say(self, count: int) -> None:
        """Hand on the next characters as text; space waits until it is known whether more than space stands there."""
        self._blank += self._text[:count]
        self._at = count
        self._commit()
        self._speaking = self._speaking or not (self._blank.isspace() or not self._blank)
        if self._speaking and self._blank:
            self._events.append(Text(self._blank))
            self._blank = ""

    def _read_calls(self) -> Generator[None, None, bool]:
        """Read one object, several, or a list of them, and the closing mark; False, back at the start, for none."""
        before = self._calls
        with suppress(Malformed):
            yield from self._read_objects()
        self._at = 0
        if self._calls == before:
            return False
        yield from self._skip_space()
        close = self.marks.close
        found = yield from self._peek(len(close))
        if found and close.startswith(found):  # the text may end within the mark
            self._at += len(found)
            self._commit()
        self._at = 0
        return True

    def _read_objects(self) -> Steps:
        if (yield from self._expect("[{")) == "[":
            yield from self._expect("{")
            yield from self._read_call()
            while (yield from self._expect(",]")) == ",":
                yield from self._expect("{")
                yield from self._read_call()
            self._commit()
            return
        while True:
            yield from self._read_call()
            yield from self._skip_space()
            if (yield from self._peek()) == ";":
                self._at += 1
            yield from self._expect("{")

    def _read_call(self) -> Steps:
        """Read an object behind its brace, its fields in any order; other fields are passed over."""
        name: str | None = None
        arguments: str | None = None
        while True:
            key = yield from self._read_string()
            yield from self._expect(":")
            yield from self._skip_space()
            if key in ARGUMENTS and arguments is None:
                arguments = yield from self._read_arguments(name)
            elif key == "name" and name is None:
                name = yield from self._read_string()
                if not NAME.fullmatch(name):
                    raise Malformed
                if arguments is not None:
                    index = self._start(name)
                    self._events.append(Arguments(index, arguments))
            else:
                yield from self._skip_value()
            if (yield from self._expect(",}")) == "}":
                break
        if name is None or arguments is None:
            raise Malformed
        self._commit()

    def _read_arguments(self, name: str | None) -> Generator[None, None, str]:
        """Arguments wait for the name; where it is known they are handed on while they come, and nothing is left."""
        if (yield from self._peek()) != "{":
            raise Malformed
        if name is not None:
            yield from self._read_nested(self._start(name))
            return ""
        start = self._at
        yield from self._read_nested(None)
        return self._text[start : self._at]

    def _start(self, name: str) -> int:
        self._events.append(CallStarted(self._calls, name))
        self._blank, self._speaking = "", False
        self._commit()
        self._calls += 1
        return self._calls - 1

    def _read_nested(self, index: int | None) -> Steps:
        """Read an object or a list to its end, and hand it on as the arguments of call `index` if there is one."""
        depth, quoted, escaped = 0, False, False
        while True:
            while self._at < len(self._text):
                letter = self._text[self._at]
                self._at += 1
                if quoted:
                    quoted = escaped or letter != '"'
                    escaped = letter == "\\" and not escaped
                    continue
                quoted = letter == '"'
                depth += (letter in "{[") - (letter in "}]")
                if depth == 0:
                    break
            if index is not None and self._at:
                self._events.append(Arguments(index, self._text[: self._at]))
                self._commit()
            if depth == 0:
                return
            if self._ended:
                raise Malformed
            yield

    def _read_string(self) -> Generator[None, None, str]:
        yield from self._expect('"')
        start = self._at - 1
        while (letter := (yield from self._peek())) != '"':
            if not letter:
                raise Malformed
            self._at += 2 if letter == "\\" else 1
        self._at += 1
        try:
            return str(json.loads(self._text[start : self._at]))
        except ValueError:
            raise Malformed from None

    def _skip_value(self) -> Steps:
        letter = yield from self._peek()
        if letter == '"':
            yield from self._read_string()
        elif letter and letter in "{[":
            yield from self._read_nested(None)
        else:
            start = self._at
            while (letter := (yield from self._peek())).isalnum() or (letter and letter in "+-."):
                self._at += 1
            if self._at == start:
                raise Malformed

    def _expect(self, choices: str) -> Generator[None, None, str]:
        """Pass over space and one of the characters; Malformed if something else or nothing stands there."""
        yield from self._skip_space()
        letter = yield from self._peek()
        if not letter or letter not in choices:
            raise Malformed
        self._at += 1
        return letter

    def _skip_space(self) -> Steps:
        while (yield from self._peek()).isspace():
            self._at += 1

    def _peek(self, count: int = 1) -> Generator[None, None, str]:
        """The next characters, once that many have come; fewer only where the text ends."""
        while len(self._text) < self._at + count and not self._ended:
            yield
        return self._text[self._at : self._at + count]

    def _commit(self) -> None:
        """Everything up to here is settled: reading never goes back behind it."""
        self._text, self._at = self._text[self._at :], 0


def overlap(text: str, mark: str) -> int:
    """How many characters at the text's end may be the beginning of a mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)


def join_events(events: Iterable[Event]) -> tuple[str, list[ToolCall]]:
    """The text and the calls that the events of one answer make."""
    texts: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for event in events:
        if isinstance(event, Text):
            texts.append(event.text)
        elif isinstance(event, CallStarted):
            names.append(event.name)
            arguments.append([])
        else:
            arguments[event.index].append(event.text)
    calls = [ToolCall(name, "".join(pieces)) for name, pieces in zip(names, arguments, strict=True)]
    return "".join(texts), calls
