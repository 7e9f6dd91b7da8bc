"""Shared-context episodes through a KV policy: how likely it finds the gold answers, beside the plain cache.

A policy that makes prompts smaller does so when the prompt is computed, one with `every` at lengths behind it too. In
multi_request the prompt is the context alone; each piece is computed anew, which gives the same as starting from one
kept cache. In multi_turn it is the context and the first query; later queries follow, and gold answers as if they were
generated. A query is read at once, but for what crosses such a length, an answer a token a step. Knows no policy by
name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from headrace.cache.policies.base import KVPolicy
from headrace.cache.policies.choice import make_policy
from headrace.cache.policies.plain import Plain
from headrace.checkpoint import Tokenizer
from headrace.core import InputError
from headrace.judge.contexts_summary import EpisodeScores, TurnScore
from headrace.judge.driver import TOKENS_AT_ONCE, CacheDriver, Tell
from headrace.judge.episodes import Episode, Mode
from headrace.judge.quality import LOGIT_ROWS
from headrace.model import Model

# A query and what is taken for its answer, as tokens.
Exchange = tuple[list[int], list[int]]
# A policy of its own for each cache.
MakePolicy = Callable[[], KVPolicy]


@dataclass(frozen=True, slots=True)
class Text:
    """What is fed, step by step, the prompt first; and after some steps, by their places, the answer's token that
    comes next."""

    steps: tuple[list[int], ...]
    targets: dict[int, int]

    @property
    def length(self) -> int:
        return sum(map(len, self.steps))


@dataclass(frozen=True, slots=True)
class Script:
    """An episode's texts. `golds` have the gold answers of all turns in their order, `answers` by turn; `others` are,
    of a turn with choices, a text for each wrong one, whose tokens are the last of the text's targets."""

    golds: list[Text]
    answers: list[list[int]]
    others: list[list[tuple[Text, int]]]

    @property
    def texts(self) -> list[Text]:
        return [*self.golds, *(text for turn in self.others for text, _ in turn)]


@dataclass(frozen=True, slots=True)
class Answers:
    """By target of a text: its log-probability, and the token that was likeliest there."""

    logprobs: list[float]
    likeliest: list[int]


@dataclass(frozen=True, slots=True)
class TurnFound:
    """One turn with one cache: see `TurnScore`."""

    logprobs: list[float]
    likeliest: list[int]
    correct: bool

    def beside(self, full: TurnFound) -> TurnScore:
        agrees = tuple(mine == other for mine, other in zip(self.likeliest, full.likeliest, strict=True))
        return TurnScore(tuple(self.logprobs), agrees, self.correct)


class ContextsJudge:
    """Policies on the same episodes; the plain cache answers them once for all."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer, episodes: Rows[Episode], mode: Mode, block_size: int, tell: Tell
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.tell = tell
        self.scripts = [write_script(episode, mode, tokenizer) for episode in episodes]
        longest = max(text.length for script in self.scripts for text in script.texts)
        if longest > model.config.context_length:
            raise InputError(
                f"an episode has {longest:,} tokens, and the model's context {model.config.context_length:,}: ask for "
                "smaller ones"
            )
        self.full = self._answer(Plain, f"{mode}, plain, to compare with")
        self.mode = mode

    def judge(self, kv: str) -> list[EpisodeScores]:
        """By episode, the policy of an expression beside the plain cache. Raises InputError for one that cannot serve
        this model."""
        found = self._answer(partial(make_policy, kv), f"{self.mode}, {kv}")
        return [
            EpisodeScores(
                tuple(full.beside(full) for full in fulls),
                tuple(mine.beside(full) for mine, full in zip(turns, fulls, strict=True)),
            )
            for turns, fulls in zip(found, self.full, strict=True)
        ]

    def _answer(self, make: MakePolicy, name: str) -> list[list[TurnFound]]:
        texts = [text for script in self.scripts for text in script.texts]
        answers = read_answers(self.model, make, self.block_size, texts, lambda done: self.tell(f"{name}: {done}"))
        left = iter(answers)
        return [score_turns(script, list(islice(left, len(script.texts)))) for script in self.scripts]


def write_script(episode: Episode, mode: Mode, tokenizer: Tokenizer) -> Script:
    """An episode's texts in tokens. Context, queries and answers are encoded by themselves, so that a context has the
    same tokens whatever follows."""

    def encode(part: str) -> list[int]:
        return tokenizer.encode(part, special=False)

    context, joined = tokenizer.encode(episode.context), mode == "multi_turn"
    exchanges = [(encode(turn.query), encode(turn.answer)) for turn in episode.turns]
    earlier = [exchanges[:turn] if joined else [] for turn in range(len(exchanges))]
    golds = [exchanges] if joined else [[exchange] for exchange in exchanges]
    others = [
        [
            (write_text(context, [*before, (query, choice)], joined), len(choice))
            for choice in (encode(each) for each in turn.choices if each != turn.answer)
        ]
        for turn, before, (query, _) in zip(episode.turns, earlier, exchanges, strict=True)
    ]
    return Script([write_text(context, each, joined) for each in golds], [gold for _, gold in exchanges], others)


def write_text(context: list[int], exchanges: Rows[Exchange], joined: bool) -> Text:
    """`joined`: the first query belongs to the prompt."""
    steps, targets = [context], {}
    for number, (query, answer) in enumerate(exchanges):
        if joined and number == 0:
            steps[0] = context + query
        else:
            steps.append(query)
        for token in answer:
            targets[len(steps) - 1] = token
            steps.append([token])
    # Nothing comes after the last answer.
    return Text(tuple(steps[:-1]), targets)


def read_answers(model: Model, make: MakePolicy, block_size: int, texts: Rows[Text], tell: Tell) -> list[Answers]:
    """Feed texts through caches of a policy, several side by side; what became of their targets, text by text."""
    found: list[Answers] = []
    for group in take_groups(texts):
        driver = CacheDriver(model, make(), block_size, len(group), max(text.length for text in group))
        sequences = [driver.start(text.steps[0]) for text in group]
        rows: list[list[Tensor]] = [[] for _ in group]
        for place, (sequence, text) in enumerate(zip(sequences, group, strict=True)):
            tell(f"text {len(found) + place + 1} of {len(texts)}")
            hidden = driver.read(sequence)
            if 0 in text.targets:
                rows[place].append(hidden[0])
        for step in range(1, max(len(text.steps) for text in group)):
            fed = [place for place, text in enumerate(group) if step < len(text.steps)]
            hidden = driver.feed([(sequences[place], group[place].steps[step]) for place in fed])
            for place, row in zip(fed, hidden, strict=True):
                if step in group[place].targets:
                    rows[place].append(row)
        found += [read_rows(model, torch.stack(own), text) for own, text in zip(rows, group, strict=True)]
    return found


def take_groups(texts: Rows[Text]) -> Iterator[list[Text]]:
    group: list[Text] = []
    for text in texts:
        if group and max(each.length for each in [*group, text]) * (len(group) + 1) > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def read_rows(model: Model, hidden: Tensor, text: Text) -> Answers:
    """Hidden states [targets, hidden] of the steps before a text's targets."""
    answers = Answers([], [])
    targets = torch.tensor(list(text.targets.values()), device=hidden.device)
    for rows, wanted in zip(torch.split(hidden, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True):
        logprobs = model.logits(rows).log_softmax(-1)
        answers.logprobs.extend(logprobs.gather(1, wanted[:, None]).flatten().tolist())
        answers.likeliest.extend(logprobs.argmax(-1).tolist())
    return answers


def score_turns(script: Script, answers: Rows[Answers]) -> list[TurnFound]:
    """The turns of an episode, from what became of its texts. Without choices an answer is right if it is what greedy
    generation says; with choices, if no other is as likely."""
    golds, rest = answers[: len(script.golds)], iter(answers[len(script.golds) :])
    logprobs = iter([value for each in golds for value in each.logprobs])
    likeliest = iter([token for each in golds for token in each.likeliest])
    turns = []
    for gold, others in zip(script.answers, script.others, strict=True):
        own = list(islice(logprobs, len(gold)))
        greedy = list(islice(likeliest, len(gold)))
        wrong = [sum(next(rest).logprobs[-length:]) for _, length in others]
        turns.append(TurnFound(own, greedy, sum(own) > max(wrong) if wrong else greedy == gold))
    return turns
