"""Shared contexts whose answers are found by string: keys in JSON, passkeys in real text, strings by both their ends,
and values passed from variable to variable. SCBench's string retrieval; its passkeys are from its mixed tasks.

Nothing but an exact match finds the answer, so nothing of the context can be thrown away safely.
"""

from __future__ import annotations

import json
import random
import string
import uuid
from itertools import pairwise, zip_longest
from typing import Literal

from headrace.core import InputError
from headrace.judge.episodes import (
    Episode,
    Filler,
    Turn,
    check_least,
    draw_number,
    read_words,
    spread,
    start_random,
    take_sentences,
    weave,
)

WORDS = read_words(
    "amber anchor apple autumn badge barrel basket beacon bishop bottle branch bridge butter button cabin candle "
    "canvas carbon castle cedar circle copper corner cotton desert dragon engine falcon feather flower forest garden "
    "ginger hammer harbor island jacket ladder lantern marble meadow mirror needle orange paper pepper pillow planet "
    "pocket ribbon river rocket saddle silver stone summer temple ticket tunnel velvet violet window winter yellow"
)
PLACES = read_words(
    "Lisbon Oslo Cairo Lima Dublin Prague Havana Nairobi Vienna Quito Athens Seoul Tunis Riga Bogota Ankara Geneva "
    "Manila Warsaw Hanoi Madrid Kyoto Boston Perth"
)
# Characters of the longest needle and the space after it.
NEEDLE_ROOM = len("The passkey of Nairobi is 12345. ")
LEAST_SHARING = 3
# There are as many values of four digits.
MOST_KEYS = 9000
MOST_VARIABLES = 5000
# Letters that a query gives of a word's beginning and of its end.
END = 3


def retr_kv(seed: int, n: int = 20, key: Literal["word", "uuid"] = "word", turns: int = 4) -> Episode:
    """A JSON object of `n` keys with values of four digits, all different; each turn asks one value.

    The asked keys are spread over the depth and asked in random order. Every key shares its beginning with two others
    or more: a pair of words its first word, a UUID its first eight characters.
    """
    check_least("turns", turns, 1)
    check_least("the number of keys", n, max(turns, LEAST_SHARING))
    if n > MOST_KEYS or (key == "word" and n > len(WORDS) ** 2):
        raise InputError(f"{n} different {key} keys with values of four digits cannot be made: ask for fewer")
    task = "retr_kv" if key == "word" else "retr_kv_uuid"
    source = start_random(task, seed)
    keys = make_word_keys(source, n) if key == "word" else make_uuid_keys(source, n)
    values = dict(zip(keys, source.sample(range(1000, 10000), n), strict=True))
    context = "A JSON object of keys and values:\n" + json.dumps(values) + "\n"
    asked = [keys[place] for place in spread(turns, n)]
    source.shuffle(asked)
    return Episode(context, tuple(ask_key(name, values[name]) for name in asked), task)


def ask_key(key: str, value: int) -> Turn:
    return Turn(f'\nThe value of this key in the object is\n"{key}": ', str(value))


def make_word_keys(source: random.Random, n: int) -> list[str]:
    """Different pairs of words in random order, each first word in three of them or more."""
    firsts = source.sample(WORDS, min(n // LEAST_SHARING, len(WORDS)))
    seconds = {first: source.sample(WORDS, len(WORDS)) for first in firsts}
    keys = [f"{first}-{seconds[first][index // len(firsts)]}" for index, first in cycle_to(firsts, n)]
    source.shuffle(keys)
    return keys


def make_uuid_keys(source: random.Random, n: int) -> list[str]:
    """Different UUIDs in random order, each beginning in three of them or more."""
    firsts = [f"{number:08x}" for number in source.sample(range(2**32), n // LEAST_SHARING)]
    keys = [first + str(uuid.UUID(int=source.getrandbits(128), version=4))[8:] for _, first in cycle_to(firsts, n)]
    source.shuffle(keys)
    return keys


def cycle_to(items: list[str], n: int) -> list[tuple[int, str]]:
    return [(index, items[index % len(items)]) for index in range(n)]


def multi_needle(filler: Filler, seed: int, k: int = 4, length: int = 2000) -> Episode:
    """`k` passkeys of five digits in `length` characters of real text, needle i of 1 to k at depth i / (k + 1), to the
    nearest end of a sentence; each turn asks one, in random order. Raises InputError where the text is too short or
    names too many of the places."""
    check_least("the number of passkeys", k, 1)
    source = start_random("multi_needle", seed)
    sentences = take_sentences(filler, length - k * NEEDLE_ROOM, source)
    text = " ".join(sentences)
    free = [place for place in PLACES if place not in text]
    if k > len(free):
        raise InputError(f"only {len(free)} passkeys can be told from the text's own words, not {k}")
    places = source.sample(free, k)
    codes: list[str] = []
    while len(codes) < k:
        codes.append(draw_number(source, 5, text, *codes))
    needles = [f"The passkey of {place} is {code}." for place, code in zip(places, codes, strict=True)]
    turns = [Turn(f"\nThe passkey of {place} is ", code) for place, code in zip(places, codes, strict=True)]
    source.shuffle(turns)
    return Episode(" ".join(plant(sentences, needles)) + "\n", tuple(turns), "multi_needle")


def plant(sentences: list[str], needles: list[str]) -> list[str]:
    """Sentences with the needles among them, each where as near as can be its share of the characters has passed."""
    planted = list(sentences)
    total = sum(map(len, sentences))
    ends = [sum(map(len, sentences[:count])) for count in range(len(sentences) + 1)]
    for index, needle in reversed(list(enumerate(needles, 1))):
        goal = total * index / (len(needles) + 1)
        planted.insert(min(range(len(ends)), key=lambda count: abs(ends[count] - goal)), needle)
    return planted


def prefix_suffix(seed: int, n: int = 20, length: int = 8, turns: int = 4) -> Episode:
    """`n` random words of `length` lowercase letters, no two with the same first three and last three letters; each
    turn gives these of one word. Another word begins as each asked one, and another ends as it."""
    check_least("turns", turns, 1)
    check_least("the number of words", n, 3 * turns)
    check_least("the length of a word", length, 2 * END + 1)
    source = start_random("prefix_suffix", seed)
    known: set[tuple[str, str]] = set()

    def draw(prefix: str = "", suffix: str = "") -> str:
        while True:
            letters = "".join(source.choices(string.ascii_lowercase, k=length - len(prefix) - len(suffix)))
            word = prefix + letters + suffix
            if ends(word) not in known:
                known.add(ends(word))
                return word

    asked = [draw() for _ in range(turns)]
    others = [draw(prefix=word[:END]) for word in asked] + [draw(suffix=word[-END:]) for word in asked]
    others += [draw() for _ in range(n - 3 * turns)]
    source.shuffle(others)
    context = "A list of words:\n" + "\n".join(weave(asked, others)) + "\n"
    source.shuffle(asked)
    questions = [
        Turn(f'\nThe word that begins with "{word[:END]}" and ends with "{word[-END:]}":\n', word) for word in asked
    ]
    return Episode(context, tuple(questions), "prefix_suffix")


def ends(word: str) -> tuple[str, str]:
    return word[:END], word[-END:]


def trace_variables(filler: Filler, seed: int, chains: int = 4, hops: int = 2, noise: int = 1000) -> Episode:
    """`chains` numbers of five digits, each assigned to a variable and handed on `hops` times; the assignments of all
    chains are mixed among `noise` characters of real text. Each turn asks what the last variable of a chain holds.

    SCBench asks for all names that hold a number; one number for each last name is the same trace with one gold string.
    """
    check_least("the number of chains", chains, 1)
    check_least("the number of hops", hops, 0)
    if chains * (hops + 1) > MOST_VARIABLES:
        raise InputError(f"{chains} chains of {hops} hops need more than {MOST_VARIABLES} variables: ask for fewer")
    source = start_random("trace_variables", seed)
    sentences = take_sentences(filler, noise, source)
    text = " ".join(sentences)
    names = draw_names(source, chains * (hops + 1), text)
    values: list[str] = []
    while len(values) < chains:
        values.append(draw_number(source, 5, text, *values))
    order = [chain for chain in range(chains) for _ in range(hops + 1)]
    source.shuffle(order)
    lines, reached = [], [0] * chains
    for chain in order:
        own = names[chain * (hops + 1) :]
        step = reached[chain]
        lines.append(f"VAR {own[step]} = " + (f"VAR {own[step - 1]}" if step else values[chain]))
        reached[chain] += 1
    context = "\n".join(mix_noise(lines, sentences)) + "\n"
    turns = [
        Turn(f"\nThe number that variable {names[(chain + 1) * (hops + 1) - 1]} holds is ", values[chain])
        for chain in range(chains)
    ]
    source.shuffle(turns)
    return Episode(context, tuple(turns), "trace_variables")


def draw_names(source: random.Random, count: int, text: str) -> list[str]:
    """Different names of three capitals that the text does not contain."""
    names: list[str] = []
    while len(names) < count:
        name = "".join(source.choices(string.ascii_uppercase, k=3))
        if name not in text and name not in names and name != "VAR":
            names.append(name)
    return names


def mix_noise(lines: list[str], sentences: list[str]) -> list[str]:
    """The lines, each after an equal share of the sentences; what is left of them comes last."""
    cuts = [index * len(sentences) // (len(lines) + 1) for index in range(len(lines) + 2)]
    parts = [" ".join(sentences[start:stop]) for start, stop in pairwise(cuts)]
    return [text for pair in zip_longest(parts, lines, fillvalue="") for text in pair if text]
