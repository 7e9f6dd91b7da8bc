"""`headrace chat`: a conversation in the terminal, or in a pipe, with a model here or on a server."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.flags import make_flag, sign
from headrace.core import HeadraceError, InputError
from headrace.options import DEFAULT_MODEL

if TYPE_CHECKING:
    from headrace.cli.answering import Answerer
    from headrace.cli.conversation import Conversation, Entry, Turn

TEMPERATURE = "0 is greedy; higher is more random."
BOLD, DIM, PLAIN = "\033[1m", "\033[2m", "\033[0m"
# What moves a cursor or recolours a terminal must not come out of a model.
UNPRINTABLE = dict.fromkeys(set(range(0xA0)) - set(range(0x20, 0x7F)) - {ord("\n"), ord("\t")})

CHAT_FLAGS = (
    make_flag("model", str | None, None, help="As for `headrace run`; with --url, the server's first if not given."),
    make_flag("url", str | None, None, metavar="URL", help="Ask a server, such as http://127.0.0.1:8000/v1."),
    make_flag("key_file", Path | None, None, metavar="FILE", help="File whose first line is the server's key."),
    make_flag("system", str, "", metavar="TEXT", help="How the model should answer.", show_default=False),
    make_flag("temperature", float, 0.0, metavar="NUMBER", help=f"{TEMPERATURE} [0.0]", show_default=False),
    make_flag("max_tokens", int, 1024, metavar="N", help="Most tokens of an answer. [1024]", show_default=False),
    make_flag("plain", bool, False, help="No bold and no dim text."),
    make_flag("quiet", bool, False, help="No line about tokens and speed after an answer."),
)


def chat(model: str | None, url: str | None, key_file: Path | None, plain: bool, quiet: bool, **flags: Any) -> None:
    """Talk with a model in the terminal.

    It is loaded into this process, or asked of a server with --url. Answers come as they are made; /help lists what
    can be said besides messages. Ctrl-C stops an answer, Ctrl-D leaves. Where the input is a pipe, each line is a
    message, and nothing but answers is written to standard output.

    \b
    Examples:
      headrace chat --model smollm2-135m --system 'Answer in one sentence.'
      headrace chat --url http://127.0.0.1:8000/v1 --key-file key.txt
      echo 'Why does a wheel turn?' | headrace chat --quiet
    """
    if key_file is not None and url is None:
        raise InputError("--key-file is for a server: name it with --url")
    from headrace.cli.conversation import Conversation

    talk = Conversation(flags["system"])
    talk.change("temperature", flags["temperature"])
    talk.change("max_tokens", flags["max_tokens"])
    answerer = open_answerer(model, url, key_file)
    try:
        Chat(talk, answerer, plain, quiet).run()
    finally:
        answerer.close()


sign(chat, CHAT_FLAGS)


def open_answerer(model: str | None, url: str | None, key_file: Path | None) -> Answerer:
    from headrace.cli.answering import LocalModel, Server

    if url is not None:
        return Server(url, model, None if key_file is None else read_key(key_file))
    from rich.console import Console

    with Console(stderr=True).status("loading the model"):
        return LocalModel(model or DEFAULT_MODEL)


def read_key(path: Path) -> str:
    """The first line of a file. Raises InputError where it cannot be a key."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the key: {getattr(error, 'strerror', error)}") from None
    if not lines or not lines[0].strip():
        raise InputError(f"{path}: its first line must be the key")
    return lines[0].strip()


class Chat:
    """The loop of reading and answering. In a pipe, the first error ends it; on a terminal none does."""

    def __init__(self, talk: Conversation, answerer: Answerer, plain: bool, quiet: bool) -> None:
        self.talk = talk
        self.answerer = answerer
        self.quiet = quiet
        self.person = sys.stdin.isatty()
        self.prompt_styled = sys.stdout.isatty() and not plain
        self.notes_styled = sys.stderr.isatty() and not plain
        self.asked = 0

    def run(self) -> None:
        if self.person:
            # Loading it gives `input` its history and its keys.
            import readline  # noqa: F401

            self.note(f"{self.answerer.name}; /help lists the commands, Ctrl-D leaves")
        while True:
            try:
                entry = self.read()
                if entry is None or not self.follow(entry):
                    return
            except HeadraceError as error:
                if not self.person:
                    raise
                print(f"headrace: error: {error}", file=sys.stderr)

    def read(self) -> Entry | None:
        """What was typed next; None at the end of the input."""
        from headrace.cli.conversation import read_entry

        while True:
            try:
                return read_entry(self.read_line)
            except EOFError:
                if self.person:
                    print()
                return None
            except KeyboardInterrupt:
                if not self.person:
                    raise
                print()

    def read_line(self, first: bool) -> str:
        """Raises EOFError at the end of the input, InputError for bytes that are no text."""
        mark = "> " if first else ". "
        try:
            # The marks around it tell readline that it takes no room.
            styled = f"\001{BOLD}\002{mark}\001{PLAIN}\002" if self.prompt_styled else mark
            line = input(styled) if self.person else sys.stdin.readline()
            # Under some locales such bytes come through as surrogates.
            line.encode()
        except UnicodeError:
            raise InputError(f"the input must be text in {sys.stdin.encoding}: it holds other bytes") from None
        if not line and not self.person:
            raise EOFError
        return line.rstrip("\n")

    def follow(self, entry: Entry) -> bool:
        """Answer or obey; False when the user wants to leave."""
        from headrace.cli.conversation import obey

        if not entry.command:
            if entry.text.strip():
                self.answer(entry.text)
            return True
        reply = obey(self.talk, entry.text)
        if reply.text:
            self.note(reply.text)
        if reply.again is not None:
            self.answer(reply.again.question, reply.again)
        return not reply.leave

    def answer(self, question: str, replaced: Turn | None = None) -> None:
        """Ask, and keep question and answer; after an error neither is kept, and the turn they replace is back."""
        from headrace.cli.answering import TooLong
        from headrace.cli.conversation import Turn

        turn = Turn(question)
        self.talk.turns.append(turn)
        self.asked += 1
        try:
            while turn.answer is None:
                try:
                    turn.answer = self.stream()
                except TooLong:
                    if not self.make_room():
                        raise
            if self.context_is_full():
                self.make_room()
        finally:
            if turn.answer is None and replaced is not None:
                self.talk.turns[-1] = replaced
            elif turn.answer is None:
                self.talk.take_back()

    def context_is_full(self) -> bool:
        """Whether the last answer was cut off before it had as many tokens as it may."""
        return self.answerer.cut and self.answerer.tokens < self.talk.params.max_tokens

    def make_room(self) -> bool:
        """Leave out the oldest turns; False if there are none."""
        told, dropped = self.talk.first > 0, self.talk.forget()
        if dropped and not told:
            self.note("the conversation no longer fits the model's context: its oldest turns are left out from here on")
        return dropped > 0

    def stream(self) -> str:
        """Print the answer as it comes and return it, as far as it came before a Ctrl-C."""
        # Drawn otherwise each time, so that /retry gives another answer; a greedy answer needs no seed.
        params = self.talk.params if self.talk.params.greedy else replace(self.talk.params, seed=self.asked)
        clean = self.make_cleaner()
        pieces: list[str] = []
        began = first = time.perf_counter()
        stopped = False
        try:
            for piece in self.answerer.stream(self.talk.messages(), params):
                first = first if pieces else time.perf_counter()
                pieces.append(piece)
                print(clean(piece), end="", flush=True)
        except KeyboardInterrupt:
            if not self.person:
                raise
            stopped = True
        except HeadraceError:
            if pieces:
                print(flush=True)
            raise
        print(flush=True)
        self.tell_speed(first - began, time.perf_counter() - first, stopped)
        return "".join(pieces)

    def tell_speed(self, wait: float, seconds: float, stopped: bool) -> None:
        if self.quiet:
            return
        tokens = self.answerer.tokens
        parts = [f"{tokens} token{'' if tokens == 1 else 's'}"]
        if tokens > 1 and seconds > 0:
            parts.append(f"{(tokens - 1) / seconds:.1f} a second after the first, which took {wait:.2f} s")
        if stopped:
            parts.append("stopped")
        elif self.answerer.cut:
            reason = "the context is full" if self.context_is_full() else "/set max_tokens allows more"
            parts.append(f"cut off: {reason}")
        self.note(", ".join(parts))

    def note(self, words: str) -> None:
        print(f"{DIM}{words}{PLAIN}" if self.notes_styled else words, file=sys.stderr)

    def make_cleaner(self) -> Callable[[str], str]:
        """How a piece is printed: on a terminal, without what would control it."""
        return (lambda piece: piece.translate(UNPRINTABLE)) if sys.stdout.isatty() else str
