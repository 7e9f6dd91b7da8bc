"""A conversation with a model: its turns, and the commands that change it. Knows no model and no terminal."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from headrace.core import InputError, SamplingParams

FENCE = '"""'
SETTABLE = ("temperature", "top_p", "max_tokens")


class Message(msgspec.Struct):
    """One message as OpenAI's API has it."""

    role: Literal["system", "user", "assistant"]
    content: str


class Saved(msgspec.Struct):
    """What /save writes and /load reads."""

    messages: list[Message]
    settings: dict[str, float] = {}


@dataclass(slots=True)
class Turn:
    """A question and its answer, which is None while it is being asked."""

    question: str
    answer: str | None = None


@dataclass(slots=True)
class Conversation:
    """Turns in their order, of which those before `first` no longer fit the model's context and are not sent."""

    system: str = ""
    params: SamplingParams = field(default_factory=SamplingParams)
    turns: list[Turn] = field(default_factory=list)
    first: int = 0

    def messages(self, everything: bool = False) -> list[Message]:
        """What the model gets; `everything` adds the turns that are no longer sent."""
        found = [Message("system", self.system)] if self.system else []
        for turn in self.turns if everything else self.turns[self.first :]:
            found.append(Message("user", turn.question))
            if turn.answer is not None:
                found.append(Message("assistant", turn.answer))
        return found

    def forget(self) -> int:
        """Leave the oldest turns out of what is sent; returns how many, 0 if only the open one is left.

        A quarter at a time: what is left keeps its beginning for some turns, and with it its cached prefix.
        """
        old = len(self.turns) - 1 - self.first
        dropped = min(max(old, 0), max(old // 4, 1))
        self.first += dropped
        return dropped

    def take_back(self) -> Turn:
        """Remove the last turn and return it. Raises InputError if there is none."""
        if not self.turns:
            raise InputError("there is nothing to go back to: the conversation is empty")
        turn = self.turns.pop()
        self.first = max(min(self.first, len(self.turns) - 1), 0)
        return turn

    def clear(self) -> None:
        self.turns.clear()
        self.first = 0

    def change(self, name: str, value: str | float) -> None:
        """Set temperature, top_p or max_tokens. Raises InputError for another name or a value that cannot be."""
        if name not in SETTABLE:
            raise InputError(f"there is no setting {name!r}; there are {', '.join(SETTABLE)}")
        whole = name == "max_tokens"
        try:
            number = float(value)
            if whole and number != int(number):
                raise ValueError
        except (ValueError, OverflowError):
            raise InputError(f"{name} must be {'a whole number' if whole else 'a number'}, got {value!r}") from None
        try:
            changed: dict[str, Any] = {name: int(number) if whole else number}
            self.params = dataclasses.replace(self.params, **changed)
        except ValueError as error:
            raise InputError(str(error)) from None


class Reply(NamedTuple):
    """What follows from a command: a text for the user, a turn whose question to ask again now, or the end."""

    text: str = ""
    again: Turn | None = None
    leave: bool = False


def set_system(talk: Conversation, text: str) -> Reply:
    talk.system = text
    return Reply("the system prompt is set" if text else "the system prompt is taken away")


def save(talk: Conversation, name: str) -> Reply:
    path = read_path(name, "/save")
    text = write_markdown(talk) if path.suffix == ".md" else write_json(talk)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    return Reply(f"saved in {path}")


def load(talk: Conversation, name: str) -> Reply:
    path = read_path(name, "/load")
    try:
        saved = msgspec.json.decode(path.read_bytes(), type=Saved)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a conversation that /save has written: {error}") from None
    system, turns = read_turns(saved.messages, str(path))
    changed = Conversation(params=talk.params)
    for key, value in saved.settings.items():
        changed.change(key, value)
    talk.system, talk.turns, talk.params, talk.first = system, turns, changed.params, 0
    return Reply(f"{count(len(turns), 'turn')} loaded from {path}")


def clear(talk: Conversation, _: str) -> Reply:
    talk.clear()
    return Reply("the conversation is cleared")


def retry(talk: Conversation, _: str) -> Reply:
    turn = talk.take_back()
    return Reply("at temperature 0 an answer is always the same" if talk.params.greedy else "", turn)


def undo(talk: Conversation, _: str) -> Reply:
    talk.take_back()
    return Reply(f"the last turn is taken back; {count(len(talk.turns), 'turn')} left")


def change_setting(talk: Conversation, words: str) -> Reply:
    name, _, value = words.partition(" ")
    if value:
        talk.change(name, value.strip())
    elif name:
        raise InputError("/set needs a name and a value, such as /set temperature 0.7")
    return Reply(", ".join(f"{key} {getattr(talk.params, key):g}" for key in SETTABLE))


def show_help(_: Conversation, __: str) -> Reply:
    rows = [(f"/{name} {command.argument}".rstrip(), command.meaning) for name, command in COMMANDS.items()]
    width = max(len(usage) for usage, _ in rows)
    lines = [f"{usage.ljust(width)}  {meaning}" for usage, meaning in rows]
    more = [
        f"A line that ends in \\ goes on in the next one; lines between two lines of {FENCE} are one message.",
        "// begins a message with a /. Ctrl-C stops an answer, Ctrl-D leaves.",
    ]
    return Reply("\n".join([*lines, *more]))


def leave(_: Conversation, __: str) -> Reply:
    return Reply(leave=True)


class Command(NamedTuple):
    act: Callable[[Conversation, str], Reply]
    argument: str
    meaning: str


COMMANDS = {
    "system": Command(set_system, "TEXT", "how the model should answer; without TEXT, nothing is said of it"),
    "save": Command(save, "FILE", "write the conversation as JSON, or to read if FILE ends in .md"),
    "load": Command(load, "FILE", "go on with a conversation that was saved as JSON"),
    "clear": Command(clear, "", "begin anew; system prompt and settings stay"),
    "retry": Command(retry, "", "ask the last question again"),
    "undo": Command(undo, "", "take the last question and its answer back"),
    "set": Command(change_setting, "NAME VALUE", f"change {', '.join(SETTABLE)}; without words, show them"),
    "help": Command(show_help, "", "show this"),
    "quit": Command(leave, "", "leave"),
}


def obey(talk: Conversation, line: str) -> Reply:
    """Carry out a command such as `/set temperature 0.7`. Raises InputError, the conversation being as it was."""
    name, _, words = line.removeprefix("/").partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
        raise InputError(f"there is no command /{name}; {hint}")
    return command.act(talk, words.strip())


class Entry(NamedTuple):
    """What was typed: a message, or a command."""

    text: str
    command: bool


def read_entry(read_line: Callable[[bool], str]) -> Entry:
    r"""Read one message or command, of one line or of several.

    `read_line` gets whether it is the first line, and returns a line without its end or raises EOFError, which this
    raises only where nothing was read before it.
    """
    line = read_line(True)
    if line.strip() == FENCE:
        return Entry("\n".join(read_until(read_line, lambda text: text.strip() == FENCE)), False)
    if line.endswith("\\"):
        rest = read_until(read_line, lambda text: not text.endswith("\\"), keep=True)
        line = "\n".join(part.removesuffix("\\") for part in [line, *rest])
    if line.startswith("//"):
        return Entry(line[1:], False)
    return Entry(line.strip(), line.startswith("/"))


def read_until(read_line: Callable[[bool], str], ends: Callable[[str], bool], keep: bool = False) -> list[str]:
    """Lines up to the one that ends them, which is among them with `keep`, or to the end of the input."""
    lines: list[str] = []
    try:
        while not ends(line := read_line(False)):
            lines.append(line)
    except EOFError:
        return lines
    return [*lines, line] if keep else lines


def write_json(talk: Conversation) -> str:
    settings = {name: getattr(talk.params, name) for name in SETTABLE}
    saved = msgspec.json.encode(Saved(talk.messages(everything=True), settings))
    return msgspec.json.format(saved, indent=2).decode() + "\n"


def write_markdown(talk: Conversation) -> str:
    titles = {"system": "System", "user": "You", "assistant": "Model"}
    parts = [f"## {titles[each.role]}\n\n{each.content}\n" for each in talk.messages(everything=True)]
    return "\n".join(["# Conversation\n", *parts])


def read_turns(messages: list[Message], source: str) -> tuple[str, list[Turn]]:
    """System prompt and turns. Raises InputError unless questions and answers follow each other."""
    system = messages[0].content if messages and messages[0].role == "system" else ""
    rest = messages[1:] if messages and messages[0].role == "system" else messages
    roles = [each.role for each in rest]
    if len(rest) % 2 or roles != ["user", "assistant"] * (len(rest) // 2):
        raise InputError(f"{source}: after a system message, messages of user and assistant must follow each other")
    return system, [Turn(rest[place].content, rest[place + 1].content) for place in range(0, len(rest), 2)]


def read_path(name: str, command: str) -> Path:
    if not name:
        raise InputError(f"{command} needs a file, such as {command} talk.json")
    return Path(name).expanduser()


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
