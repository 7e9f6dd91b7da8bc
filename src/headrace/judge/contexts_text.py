"""Shared contexts of real text alone: sentences found by what they are about, and the sentence that opened a paragraph.

SCBench has books with questions, code with descriptions of functions, and papers with abstracts. Plain text has none of
these, so what its authors wrote stands in for them. Describing a sentence by three of its rarer words, in alphabetical
order and not as they stand, takes the place of describing a function (RepoQA): no run of the query's tokens occurs in
the context. A paragraph's own first sentence, left out of the context, takes the place of a summary (En.Sum).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from headrace.core import InputError
from headrace.judge.episodes import (
    Episode,
    Filler,
    Turn,
    check_least,
    clip_sentences,
    read_words,
    split_sentences,
    spread,
    start_random,
    take_sentences,
)

OPENING = 5
KEYWORDS = 3
CHOICES = 4
LONG_WORD = re.compile(r"[a-z]{4,}")
# Long words that describe nothing.
COMMON = frozenset(
    read_words(
        "about above across after again against almost along already also although always among another around back "
        "because became been before began being below between both could does down during each either else enough even "
        "ever every first from further great have here however into itself just known later least less like made make "
        "many might more most much must near never nothing often once only onto other others over rather said same "
        "says second several shall should since some something sometimes still such take than that their them "
        "themselves then there therefore these they things this those though three through thus time together toward "
        "towards under until upon usually very well went were what when where whether which while whole whom whose "
        "will with within without would years your"
    )
)


def find_sentence(filler: Filler, seed: int, length: int = 2000, turns: int = 4) -> Episode:
    """`length` characters of real text; each turn names three words of a sentence, and the answer is the sentence's
    first five. The three are not among those five, and one of them at least is in no other sentence."""
    source = start_random("find_sentence", seed)
    sentences = take_sentences(filler, length, source)
    found = pick_described(describe_all(sentences, OPENING), len(sentences), turns, source)
    questions = [
        Turn(f"\nThe sentence about {words} begins with the words:", f" {cut_opening(sentences[index])}")
        for index, words in found
    ]
    return Episode(join(sentences), tuple(questions), "find_sentence")


def next_sentence(filler: Filler, seed: int, length: int = 2000, turns: int = 4) -> Episode:
    """`length` characters of real text; each turn names three words of a sentence, and the answer is how the sentence
    after it begins, one of four beginnings from the same text. SCBench's multiple choice over a book."""
    source = start_random("next_sentence", seed)
    sentences = take_sentences(filler, length, source)
    openings = [cut_opening(sentence) for sentence in sentences]
    described = describe_all(sentences, 0)
    askable = {index: described[index] for index in described if openings[index + 1 : index + 2] not in ([], [None])}
    found = pick_described(askable, len(sentences), turns, source)
    questions = []
    for index, words in found:
        answer = f" {openings[index + 1]}"
        others = [f" {opening}" for opening in dict.fromkeys(openings) if opening and f" {opening}" != answer]
        choices = [answer, *source.sample(others, min(CHOICES - 1, len(others)))]
        source.shuffle(choices)
        query = f"\nThe sentence right after the one about {words} begins with the words:"
        questions.append(Turn(query, answer, tuple(choices)))
    return Episode(join(sentences), tuple(questions), "next_sentence")


def match_lead(filler: Filler, seed: int, length: int = 2000, turns: int = 4) -> Episode:
    """Paragraphs of real text without their first sentences, in random order, as many as `length` characters hold;
    each turn asks for the first sentence of one, out of four such sentences or as many as there are. The sentences
    differ in how likely they are without any context, so a small model's choice is near chance; its gold
    log-probability still tells. Raises InputError where fewer paragraphs of three sentences or more fit than there are
    turns, or only one."""
    check_least("turns", turns, 1)
    source = start_random("match_lead", seed)
    least = max(turns, 2)
    bodies = cut_leads(filler, length // least - len("Paragraph 00: \n"))
    leads = clip_paragraphs(source.sample(sorted(bodies), len(bodies)), bodies, length)
    if len(leads) < least:
        raise InputError(
            f"{len(leads)} paragraphs of three sentences or more fit into {length} characters, and {least} are needed: "
            "give whole paragraphs, or ask for more characters"
        )
    context = "\n".join(f"Paragraph {number}: {bodies[lead]}" for number, lead in enumerate(leads, 1)) + "\n"
    questions = []
    for index in spread(turns, len(leads)):
        others = [lead for lead in leads if lead != leads[index]]
        choices = [f" {lead}" for lead in (leads[index], *source.sample(others, min(CHOICES - 1, len(others))))]
        query = f"\nParagraph {index + 1} in one sentence:"
        questions.append(Turn(query, choices[0], tuple(sorted(choices))))
    source.shuffle(questions)
    return Episode(context, tuple(questions), "match_lead")


def cut_leads(filler: Filler, room: int) -> dict[str, str]:
    """The first sentence of each paragraph that has three, and as many of the others as `room` characters hold."""
    split = (sentences for paragraph in filler if len(sentences := split_sentences([paragraph])) >= 3)
    bodies = {lead: " ".join(clip_sentences(rest, room)) for lead, *rest in split}
    return {lead: body for lead, body in bodies.items() if body}


def clip_paragraphs(leads: Sequence[str], bodies: Mapping[str, str], length: int) -> list[str]:
    """The leads of the first paragraphs, as many as `length` characters hold with a number before each."""
    taken: list[str] = []
    for lead in leads:
        length -= len(f"Paragraph {len(taken) + 1}: {bodies[lead]}\n")
        if length < 0:
            break
        taken.append(lead)
    return taken


def pick_described(described: Mapping[int, str], size: int, turns: int, source: random.Random) -> list[tuple[int, str]]:
    """Of the sentences that can be described, some that are spread over the text of `size` sentences, in random order.
    Raises InputError where there are fewer than `turns`."""
    check_least("turns", turns, 1)
    if len(described) < turns:
        raise InputError(
            f"{len(described)} of {size} sentences can be told by their words, and {turns} turns need as many: give "
            "longer text or ask for fewer turns"
        )
    left, found = dict(described), []
    for goal in spread(turns, size):
        nearest = min(left, key=lambda index: abs(index - goal))
        found.append((nearest, left.pop(nearest)))
    source.shuffle(found)
    return found


def describe_all(sentences: Sequence[str], first_word: int) -> dict[int, str]:
    """Three long words of each sentence, from its `first_word` on and none of them before it, those in the fewest
    sentences; without the sentences that have not three or none of their own."""
    counts = Counter(word for sentence in sentences for word in long_words(sentence))
    described = {}
    for index, sentence in enumerate(sentences):
        parts = sentence.split()
        words = long_words(" ".join(parts[first_word:])) - long_words(" ".join(parts[:first_word]))
        rarest = sorted(words, key=lambda word: (counts[word], -len(word), word))[:KEYWORDS]
        if len(rarest) == KEYWORDS and counts[rarest[0]] == 1:
            first, second, third = sorted(rarest)
            described[index] = f"{first}, {second} and {third}"
    return described


def long_words(text: str) -> set[str]:
    return set(LONG_WORD.findall(text.lower())) - COMMON


def cut_opening(sentence: str) -> str | None:
    """The first five words, or None for a sentence that has no more."""
    words = sentence.split()
    return " ".join(words[:OPENING]) if len(words) > OPENING else None


def join(sentences: Sequence[str]) -> str:
    return " ".join(sentences) + "\n"
