"""Conversations over one shared context, as plain text. Knows no tokens, no model and no task: those are in `contexts`.

After SCBench (arXiv 2412.10319), whose point is that one context is asked more than one thing: a cache that was
compressed for the first question may have lost what the second one needs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from headrace.core import InputError

# multi_turn: each query follows all earlier ones and their gold answers; a policy may compress once the first is known.
# multi_request: each query follows the context alone, which is compressed before any query is visible.
Mode = Literal["multi_turn", "multi_request"]
MODES: tuple[Mode, ...] = ("multi_turn", "multi_request")

# Real text: a paragraph each.
Filler = Sequence[str]
Item = TypeVar("Item")

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\S)")
SHORTEST_SENTENCE = 20


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its gold answer. With `choices`, of which the answer is one, it is scored by which choice is
    likeliest, else by what is generated.

    `query` begins with a line break, and `query` and `answer` join as they are: the space between them belongs to the
    one that keeps a tokenizer from splitting a word.
    """

    query: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Episode:
    """A context and what is asked about it, one turn after the other."""

    context: str
    turns: tuple[Turn, ...]
    task: str


def start_random(task: str, seed: int) -> random.Random:
    """A source of its own for each task and seed, the same on every machine."""
    return random.Random(f"{task} {seed}")


def read_words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def check_least(what: str, value: int, least: int) -> None:
    """Raises InputError for a value below `least`."""
    if value < least:
        raise InputError(f"{what} must be {least} or more, not {value}")


def spread(count: int, size: int) -> list[int]:
    """`count` of the places 0 to `size` - 1, evenly apart and as far from both ends as from half of each other."""
    return [(2 * index + 1) * size // (2 * count) for index in range(count)]


def weave(asked: Sequence[Item], others: Sequence[Item]) -> list[Item]:
    """All items in one list, the asked ones in their order and spread evenly over it."""
    places = dict(zip(spread(len(asked), len(asked) + len(others)), asked, strict=True))
    rest = iter(others)
    return [places[place] if place in places else next(rest) for place in range(len(asked) + len(others))]


def draw_number(source: random.Random, digits: int, *texts: str) -> str:
    """A number of so many digits that none of the texts contains."""
    while True:
        number = str(source.randrange(10 ** (digits - 1), 10**digits))
        if not any(number in text for text in texts):
            return number


def split_sentences(filler: Filler) -> list[str]:
    """All sentences in their order. What does not end as a sentence, such as a heading, is left out."""
    pieces = (piece for paragraph in filler for piece in SENTENCE_END.split(" ".join(paragraph.split())))
    return [piece for piece in pieces if len(piece) >= SHORTEST_SENTENCE and piece[-1] in ".!?"]


def take_sentences(filler: Filler, length: int, source: random.Random) -> list[str]:
    """Neighbouring sentences from a random place, as many as `length` characters hold; none for 0 characters. Raises
    InputError for a text that is too short or has no sentence short enough."""
    if not length:
        return []
    sentences = split_sentences(filler)
    total, latest = 0, len(sentences)
    while latest and total < length:
        latest -= 1
        total += len(sentences[latest]) + 1
    if total < length:
        raise InputError(f"the text has {total} characters in sentences, and {length} are needed: give more text")
    starts = [start for start in range(latest + 1) if len(sentences[start]) < length]
    if not starts:
        raise InputError(f"no sentence fits into {length} characters: ask for more")
    return clip_sentences(sentences[source.choice(starts) :], length)


def clip_sentences(sentences: Sequence[str], length: int) -> list[str]:
    """The first sentences, as many as `length` characters hold with a space after each."""
    taken = []
    for sentence in sentences:
        length -= len(sentence) + 1
        if length < 0:
            break
        taken.append(sentence)
    return taken
