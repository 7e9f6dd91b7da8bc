"""Shared contexts: the same from the same seed, what is asked is there and where it should be, and the arithmetic."""

from __future__ import annotations

import importlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import pytest

from headrace.checkpoint import open_checkpoint
from headrace.core import InputError
from headrace.judge.contexts import TASKS, TOKENS, mix
from headrace.judge.contexts_global import KINDS, STATISTICS, many_shot, math_find
from headrace.judge.contexts_strings import multi_needle, prefix_suffix, retr_kv, trace_variables
from headrace.judge.contexts_summary import EpisodeScores, Regret, TurnPoint, TurnScore, summarise
from headrace.judge.contexts_text import OPENING, find_sentence, match_lead, next_sentence
from headrace.judge.episodes import Turn, split_sentences, spread, take_sentences, weave

ROOT = Path(__file__).resolve().parents[1]
SEEDS = range(20)


@pytest.fixture(scope="module")
def notes() -> list[str]:
    lines = (ROOT / "examples" / "notes.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def find_depths(context: str, evidence: Iterable[str]) -> list[float]:
    """Where each begins, as a share of the context's characters, in order."""
    return sorted(context.index(each) / len(context) for each in evidence)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tokens", [200, TOKENS])
def test_every_task_follows_its_seed_and_size(name: str, tokens: int, notes: list[str]) -> None:
    made = [TASKS[name](notes, seed, tokens) for seed in SEEDS]
    assert made == [TASKS[name](notes, seed, tokens) for seed in SEEDS]
    assert len(set(made)) > len(made) // 2
    for episode in made:
        assert episode.task == name
        assert 3 <= len(episode.turns) <= 5 and len(episode.context) <= 4 * tokens
        assert len({turn.query for turn in episode.turns}) == len(episode.turns)
        for turn in episode.turns:
            assert turn.query.startswith("\n") and turn.query not in episode.context
            assert turn.query.endswith((" ", "\n")) != turn.answer.startswith(" ")
            assert not turn.choices or (turn.choices.count(turn.answer) == 1 and len(turn.choices) >= 2)
            assert len(set(turn.choices)) == len(turn.choices)


@pytest.mark.parametrize("name", TASKS)
def test_sizes_are_near_the_real_tokens(name: str, notes: list[str], smollm2_path: Path) -> None:
    tokenizer = open_checkpoint(str(smollm2_path)).tokenizer()
    for tokens in (200, TOKENS):
        counts = [len(tokenizer.encode(TASKS[name](notes, seed, tokens).context)) for seed in SEEDS]
        assert 0.6 * tokens < min(counts) and max(counts) < 1.2 * tokens
    assert 1.2 * TOKENS <= 600


def test_a_list_has_no_more_numbers_than_differ(notes: list[str]) -> None:
    assert len(TASKS["math_find"](notes, 1, 100_000).context.split(",")) == 899


def test_spread_and_weave() -> None:
    assert spread(4, 20) == [2, 7, 12, 17]
    assert spread(1, 1) == [0] and spread(3, 3) == [0, 1, 2]
    assert weave("AB", "cdefgh") == list("cdAefgBh")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("key", "shared"), [("word", r"[a-z]+"), ("uuid", r"[0-9a-f]{8}")])
def test_keys_share_beginnings_and_values_are_unique(seed: int, key: str, shared: str) -> None:
    episode = retr_kv(seed, 20, key, 4)  # type: ignore[arg-type]
    pairs = json.loads(episode.context.partition("\n")[2])
    assert len(pairs) == len(set(pairs.values())) == 20
    assert all(1000 <= value <= 9999 for value in pairs.values())
    if key == "uuid":
        assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", name) for name in pairs)
    beginnings = Counter(re.match(shared, name)[0] for name in pairs)  # type: ignore[index]
    assert min(beginnings.values()) >= 3
    for turn in episode.turns:
        name = turn.query.rpartition("\n")[2].removesuffix(": ").strip('"')
        assert str(pairs[name]) == turn.answer
    depths = find_depths(episode.context, map(quote_pair, episode.turns))
    assert [int(depth * 4) for depth in depths] == [0, 1, 2, 3]


def test_order_of_asking_is_not_the_order_of_depth() -> None:
    episodes = [retr_kv(seed) for seed in range(40)]
    first = [find_depths(each.context, [quote_pair(each.turns[0])])[0] for each in episodes]
    assert sum(depth < 0.5 for depth in first) in range(8, 33)


def quote_pair(turn: Turn) -> str:
    """A key and its value as the object has them."""
    return turn.query.rpartition("\n")[2] + turn.answer


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 4])
def test_needles_are_at_their_depths(seed: int, k: int, notes: list[str]) -> None:
    episode = multi_needle(notes, seed, k, 2000)
    assert 1700 < len(episode.context) <= 2000
    needles = [f"{turn.query.strip()} {turn.answer}." for turn in episode.turns]
    for needle, turn in zip(needles, episode.turns, strict=True):
        assert episode.context.count(needle) == episode.context.count(turn.answer) == 1
    for index, depth in enumerate(find_depths(episode.context, needles), 1):
        assert depth == pytest.approx(index / (k + 1), abs=0.08)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_ends_tell_a_word_and_one_end_does_not(seed: int) -> None:
    episode = prefix_suffix(seed, 20, 8, 4)
    words = episode.context.split("\n")[1:-1]
    assert len(words) == len({(word[:3], word[-3:]) for word in words}) == 20
    assert all(re.fullmatch("[a-z]{8}", word) for word in words)
    for turn in episode.turns:
        prefix, suffix = re.findall('"(...)"', turn.query)
        assert [word for word in words if word.startswith(prefix) and word.endswith(suffix)] == [turn.answer]
        assert sum(word.startswith(prefix) for word in words) > 1 and sum(word.endswith(suffix) for word in words) > 1
    depths = find_depths(episode.context, [turn.answer for turn in episode.turns])
    assert [int(depth * 4) for depth in depths] == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("noise", [0, 1000])
def test_variables_lead_to_their_numbers(seed: int, noise: int, notes: list[str]) -> None:
    episode = trace_variables(notes, seed, 3, 2, noise)
    held: dict[str, str] = {}
    for name, value in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", episode.context, re.MULTILINE):
        assert name not in held
        held[name] = held.get(value, value)
    assert len(held) == 9 and len(set(held.values())) == 3
    asked = {turn.query.split()[-3]: turn.answer for turn in episode.turns}
    assert all(held[name] == answer for name, answer in asked.items())
    assert set(asked.values()) == set(held.values()) and all(name not in held.values() for name in asked)
    real = len(re.sub(r"(?m)^VAR .*$", "", episode.context))
    assert real > 0.8 * noise and len(episode.context) < noise + 9 * 24


@pytest.mark.parametrize("seed", SEEDS)
def test_statistics_are_those_of_the_list(seed: int) -> None:
    episode = math_find(seed, 21, tuple(STATISTICS))
    numbers = [int(number) for number in re.findall(r"\d+", episode.context)]
    ordered = sorted(numbers)
    assert len(set(numbers)) == 21 and all(100 <= number <= 999 for number in numbers)
    expected = [max(numbers), min(numbers), median(numbers), ordered[-2], ordered[1]]
    assert [int(turn.answer) for turn in episode.turns] == expected
    assert [turn.answer for turn in math_find(seed).turns] == [turn.answer for turn in episode.turns[:3]]


@pytest.mark.parametrize("seed", SEEDS)
def test_examples_teach_one_label_a_kind_and_none_is_asked(seed: int) -> None:
    episode = many_shot(seed, 40, 3, 4)
    shots = [re.fullmatch(r"\w+ (\w+): (\w+)", line) for line in episode.context.split("\n")[1:-1]]
    taught = [(shot[1], shot[2]) for shot in shots if shot]
    assert len(taught) == 40 and max(Counter(label for _, label in taught).values()) == 14
    kinds = {thing: index for index, kind in enumerate(KINDS) for thing in kind}
    labels = {kinds[thing]: label for thing, label in taught}
    assert all(labels[kinds[thing]] == label for thing, label in taught) and len(set(labels.values())) == 3
    for turn in episode.turns:
        thing = turn.query.split()[-1].rstrip(":")
        assert thing not in dict(taught) and turn.answer == f" {labels[kinds[thing]]}"
        assert sorted(label.strip() for label in turn.choices) == sorted(labels.values())


def test_labels_are_arbitrary() -> None:
    animals = {line.split()[-1] for seed in SEEDS for line in many_shot(seed).context.split("\n") if "otter:" in line}
    assert len(animals) > 3


@pytest.mark.parametrize("seed", SEEDS)
def test_sentences_are_found_by_words_that_do_not_quote_them(seed: int, notes: list[str]) -> None:
    episode = find_sentence(notes, seed, 2000, 4)
    sentences = split_sentences([episode.context])
    assert set(sentences) <= set(split_sentences(notes)) and len(episode.context) > 1700
    for turn in episode.turns:
        found = [sentence for sentence in sentences if sentence.startswith(turn.answer.strip())]
        described = [
            sentence for sentence in sentences if all(word in sentence.lower() for word in keywords(turn.query))
        ]
        assert len(found) == 1 and found == described
        assert len(turn.answer.split()) == OPENING
        assert not set(keywords(turn.query)) & set(turn.answer.lower().split())
    depths = find_depths(episode.context, [turn.answer.strip() for turn in episode.turns])
    assert depths[0] < 0.35 and depths[-1] > 0.6


def keywords(query: str) -> list[str]:
    words = re.search(r"about (\w+), (\w+) and (\w+) begins|one about (\w+), (\w+) and (\w+) begins", query)
    assert words is not None
    return [word for word in words.groups() if word]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_next_sentence_is_one_of_four_beginnings(seed: int, notes: list[str]) -> None:
    episode = next_sentence(notes, seed, 2000, 4)
    sentences = split_sentences([episode.context])
    for turn in episode.turns:
        place = next(
            index for index, each in enumerate(sentences) if all(word in each.lower() for word in keywords(turn.query))
        )
        assert sentences[place + 1].startswith(turn.answer.strip()) and len(turn.choices) == 4
        assert all(choice in f" {episode.context}" for choice in turn.choices)


@pytest.mark.parametrize("seed", SEEDS)
def test_leads_are_left_out_of_their_paragraphs(seed: int, notes: list[str]) -> None:
    episode = match_lead(notes, seed, 2000, 4)
    paragraphs = dict(re.findall(r"^Paragraph (\d+): (.*)$", episode.context, re.MULTILINE))
    assert len(paragraphs) > 8 and 1600 < len(episode.context) <= 2000
    for turn in episode.turns:
        body = paragraphs[re.search(r"\d+", turn.query)[0]]  # type: ignore[index]
        assert any(note.startswith(f"{turn.answer.strip()} {body}") for note in notes)
        assert all(choice not in episode.context for choice in turn.choices) and len(turn.choices) == 4


def test_mixed_turns_alternate(notes: list[str]) -> None:
    pairs, needles = retr_kv(1, 12, turns=2), multi_needle(notes, 1, 3, 1000)
    mixed = mix("both", pairs, needles)
    order = [pairs.turns[0], needles.turns[0], pairs.turns[1], needles.turns[1], needles.turns[2]]
    assert list(mixed.turns) == order and mixed.task == "both"
    assert mixed.context == f"{pairs.context}\n{needles.context}"


def test_sentences_are_taken_as_they_stand(notes: list[str]) -> None:
    sentences = split_sentences([" = Heading = ", "One  sentence\nover two lines.", *notes])
    assert sentences[0] == "One sentence over two lines." and len(sentences) == 1 + 60
    taken = take_sentences(notes, 1000, random.Random(3))
    assert " ".join(taken) in " ".join(sentences) and 800 < sum(len(each) + 1 for each in taken) <= 1000
    assert take_sentences([], 0, random.Random(3)) == []


def test_what_cannot_be_made_says_why(notes: list[str]) -> None:
    with pytest.raises(InputError, match=r"the text has \d+ characters in sentences, and 90000 are needed"):
        find_sentence(notes, 0, 90000)
    with pytest.raises(InputError, match="no sentence fits into 10 characters"):
        find_sentence(notes, 0, 10)
    with pytest.raises(InputError, match="can be told by their words, and 9 turns"):
        next_sentence(notes, 0, 300, 9)
    with pytest.raises(InputError, match="0 paragraphs of three sentences or more fit"):
        match_lead(split_sentences(notes), 0)
    with pytest.raises(InputError, match="number of keys must be 4 or more, not 3"):
        retr_kv(0, 3)
    with pytest.raises(InputError, match="9001 different uuid keys"):
        retr_kv(0, 9001, "uuid")
    with pytest.raises(InputError, match="number of words must be 12 or more"):
        prefix_suffix(0, 11)
    with pytest.raises(InputError, match="3000 chains of 1 hops need more than 5000 variables"):
        trace_variables(notes, 0, 3000, 1)
    with pytest.raises(InputError, match="odd number"):
        math_find(0, 20)
    with pytest.raises(InputError, match="no such statistic: mode"):
        math_find(0, 21, ("mode",))
    with pytest.raises(InputError, match="2 to 4 kinds, not of 5"):
        many_shot(0, labels=5)
    with pytest.raises(InputError, match="passkeys can be told"):
        multi_needle(notes, 0, 40, 3000)


def test_contexts_load_no_tensor_library() -> None:
    for name in ("episodes", "contexts", "contexts_strings", "contexts_text", "contexts_global", "contexts_summary"):
        text = Path(importlib.import_module(f"headrace.judge.{name}").__file__ or "").read_text()
        assert "torch" not in text


def score(logprobs: list[float], agrees: list[bool] | None = None, correct: bool = True) -> TurnScore:
    return TurnScore(tuple(logprobs), tuple(agrees or [True] * len(logprobs)), correct)


def test_summary_of_hand_made_numbers() -> None:
    first = EpisodeScores(
        full=(score([-1.0, -2.0]), score([-1.0]), score([-3.0], correct=False)),
        policy=(score([-1.5, -2.5], [True, False]), score([-3.0], [False], correct=False), score([-2.0])),
    )
    second = EpisodeScores(
        full=(score([-1.0], correct=False), score([-1.0])),
        policy=(score([-1.0]), score([-1.5])),
    )
    found = summarise([first, second])
    assert (found.turns, found.full_correct) == (5, 3)
    assert found.delta == pytest.approx((-0.5 - 2.0 + 1.0 + 0.0 - 0.5) / 5)
    assert found.worst == -2.0
    assert found.agreement == pytest.approx(4 / 6)
    assert found.kept_accuracy == pytest.approx(2 / 3)
    assert found.curve == (
        TurnPoint(1, 2, -0.25, pytest.approx(2 / 3), 1.0),
        TurnPoint(2, 2, -1.25, 0.5, 0.5),
        TurnPoint(3, 1, 1.0, 1.0, None),
    )
    assert found.regret == Regret(0.25, 0.5)


def test_the_full_cache_beside_itself_loses_nothing() -> None:
    turns = (score([-0.5, -0.25]), score([-4.0], correct=False))
    found = summarise([EpisodeScores(turns, turns)])
    assert (found.delta, found.worst, found.agreement, found.kept_accuracy) == (0.0, 0.0, 1.0, 1.0)
    assert found.regret == Regret(0.0, 0.0)


def test_one_turn_has_no_later_regret_and_nothing_has_no_summary() -> None:
    one = EpisodeScores((score([-1.0], correct=False),), (score([-2.0]),))
    found = summarise([one])
    assert found.regret == Regret(1.0, None)
    assert found.kept_accuracy is None and found.full_correct == 0
    with pytest.raises(ValueError, match="nothing was measured"):
        summarise([])
    with pytest.raises(ValueError, match=r"turns of \[1\] tokens with the full cache and of \[2\]"):
        EpisodeScores((score([-1.0]),), (score([-1.0, -1.0]),))
    with pytest.raises(ValueError, match="2 log-probabilities beside 1 agreements"):
        score([-1.0, -1.0], [True])
