"""Shared contexts whose answers need all of them: a statistic of a list, and a mapping learnt from many examples.

SCBench's global information, after its Math.Find and ICL.ManyShot. Its summaries are in `contexts_text`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headrace.core import InputError
from headrace.judge.episodes import Episode, Turn, check_least, read_words, start_random

# What is asked for, and where it is among the sorted numbers.
STATISTICS: dict[str, tuple[str, Callable[[Sequence[int]], int]]] = {
    "max": ("largest", lambda ordered: ordered[-1]),
    "min": ("smallest", lambda ordered: ordered[0]),
    "median": ("median", lambda ordered: ordered[len(ordered) // 2]),
    "second max": ("second largest", lambda ordered: ordered[-2]),
    "second min": ("second smallest", lambda ordered: ordered[1]),
}
NUMBERS = range(100, 1000)

ADJECTIVES = read_words(
    "small quiet old heavy pretty strange brown common cheap famous clean dark fine plain round simple"
)
KINDS = (
    read_words("otter heron horse rabbit tiger eagle goat spider whale monkey sheep wolf camel donkey snake turtle"),
    read_words(
        "hammer saw drill wrench shovel chisel axe pliers rake ladder screwdriver anvil file clamp trowel crowbar"
    ),
    read_words("bread cheese soup rice butter cake noodle honey pasta salad sausage yogurt omelette pancake jam stew"),
    read_words("shirt scarf glove coat skirt sock sweater hat jacket boot apron vest dress trousers cap blouse"),
)
LABELS = read_words("paper north seven cloud silver engine window music")


def math_find(seed: int, n: int = 21, statistics: Sequence[str] = ("max", "min", "median")) -> Episode:
    """`n` different numbers of three digits; each turn asks one of the statistics, by its name in STATISTICS, in the
    order given. Raises InputError for an even `n`, whose median is no number of the list, and for more than 899."""
    check_least("the number of numbers", n, 3)
    if n % 2 == 0 or n > len(NUMBERS):
        raise InputError(f"a list of {n} numbers cannot be made: give an odd number below {len(NUMBERS)}")
    if unknown := set(statistics) - set(STATISTICS):
        raise InputError(f"no such statistic: {', '.join(sorted(unknown))}; there are {', '.join(STATISTICS)}")
    source = start_random("math_find", seed)
    numbers = source.sample(NUMBERS, n)
    context = "A list of numbers:\n" + ", ".join(map(str, numbers)) + "\n"
    turns = []
    for name in statistics:
        words, find = STATISTICS[name]
        turns.append(Turn(f"\nThe {words} number in the list is ", str(find(sorted(numbers)))))
    return Episode(context, tuple(turns), "math_find")


def many_shot(seed: int, n: int = 40, labels: int = 3, turns: int = 4) -> Episode:
    """`n` things, each with a label that stands for its kind (animals, tools, food, clothes); which word labels which
    kind is arbitrary, so only the examples can tell. Each turn asks for the label of a thing that no example has, and
    the answer is one of the labels. Kinds take turns among the examples, so every label is equally frequent."""
    if not 2 <= labels <= len(KINDS):
        raise InputError(f"there are things of 2 to {len(KINDS)} kinds, not of {labels}")
    most = labels * (len(KINDS[0]) // 2)
    if not 1 <= turns <= most:
        raise InputError(f"{labels} kinds have things for 1 to {most} turns, not for {turns}")
    check_least("the number of examples", n, labels)
    source = start_random("many_shot", seed)
    names = source.sample(LABELS, labels)
    things = [source.sample(kind, len(kind)) for kind in source.sample(KINDS, labels)]
    first = source.randrange(labels)
    asked = [(first + turn) % labels for turn in range(turns)]
    questions = [Turn(f"\n{source.choice(ADJECTIVES)} {things[kind].pop()}:", f" {names[kind]}") for kind in asked]
    shots = []
    for index in range(n):
        kind = index % labels
        shots.append(f"{source.choice(ADJECTIVES)} {source.choice(things[kind])}: {names[kind]}")
    source.shuffle(shots)
    source.shuffle(questions)
    choices = tuple(f" {name}" for name in sorted(names))
    turns_asked = tuple(Turn(question.query, question.answer, choices) for question in questions)
    return Episode("Things and their labels:\n" + "\n".join(shots) + "\n", turns_asked, "many_shot")
