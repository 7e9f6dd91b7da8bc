"""The shared-context suite: its tasks by name, at any size. Knows no tokens: it only guesses how many a text has.
After SCBench (arXiv 2412.10319), with contexts made from a seed and real text.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, zip_longest

from headrace.judge.contexts_global import NUMBERS, many_shot, math_find
from headrace.judge.contexts_strings import multi_needle, prefix_suffix, retr_kv, trace_variables
from headrace.judge.contexts_text import find_sentence, match_lead, next_sentence
from headrace.judge.episodes import Episode, Filler

# What a small model of some hundred million parameters can still read.
TOKENS = 500

# Takes real text in paragraphs, a seed, and about how many tokens the context may have. Raises InputError where
# the text is too short, or the tokens are too few: 200 are enough for text of ordinary sentences.
Task = Callable[[Filler, int, int], Episode]

# Tokens by the tokenizer of SmolLM2: of a pair in JSON, a word of eight random letters, a line with an assignment, an
# example and a number; and the characters of English to a token.
WORD_PAIR = 12
UUID_PAIR = 40
RANDOM_WORD = 6
ASSIGNMENT = 12
EXAMPLE = 6
NUMBER = 5
CHARACTERS = 4


def mix(task: str, first: Episode, second: Episode) -> Episode:
    """A task of two contexts one after the other, and their turns alternating, the first one's first."""
    turns = chain.from_iterable(zip_longest(first.turns, second.turns))
    asked = tuple(turn for turn in turns if turn is not None)
    return Episode(f"{first.context}\n{second.context}", asked, task)


def mix_kv_needle(filler: Filler, seed: int, tokens: int) -> Episode:
    half = tokens // 2
    pairs = retr_kv(seed, half // WORD_PAIR, turns=2)
    return mix("mix_kv_needle", pairs, multi_needle(filler, seed, 2, half * CHARACTERS))


def mix_lead_needle(filler: Filler, seed: int, tokens: int) -> Episode:
    half = tokens // 2
    lead = match_lead(filler, seed, half * CHARACTERS, turns=2)
    return mix("mix_lead_needle", lead, multi_needle(filler, seed, 2, half * CHARACTERS))


def trace(filler: Filler, seed: int, tokens: int) -> Episode:
    chains, hops = 4, 2
    noise = max(tokens - chains * (hops + 1) * ASSIGNMENT, 0) * CHARACTERS
    return trace_variables(filler, seed, chains, hops, noise)


# By what they try, in the paper's order: retrieval by string, retrieval by meaning, global information, many tasks.
# Same name, text, seed and size give the same episode.
TASKS: dict[str, Task] = {
    "retr_kv": lambda filler, seed, tokens: retr_kv(seed, tokens // WORD_PAIR),
    "retr_kv_uuid": lambda filler, seed, tokens: retr_kv(seed, tokens // UUID_PAIR, "uuid"),
    "prefix_suffix": lambda filler, seed, tokens: prefix_suffix(seed, tokens // RANDOM_WORD),
    "trace_variables": trace,
    "multi_needle": lambda filler, seed, tokens: multi_needle(filler, seed, 4, tokens * CHARACTERS),
    "find_sentence": lambda filler, seed, tokens: find_sentence(filler, seed, tokens * CHARACTERS, 3),
    "next_sentence": lambda filler, seed, tokens: next_sentence(filler, seed, tokens * CHARACTERS, 3),
    "math_find": lambda filler, seed, tokens: math_find(seed, min(tokens // NUMBER // 2 * 2, len(NUMBERS)) - 1),
    "many_shot": lambda filler, seed, tokens: many_shot(seed, tokens // EXAMPLE),
    "match_lead": lambda filler, seed, tokens: match_lead(filler, seed, tokens * CHARACTERS),
    "mix_kv_needle": mix_kv_needle,
    "mix_lead_needle": mix_lead_needle,
}
