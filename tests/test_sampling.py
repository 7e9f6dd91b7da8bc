"""Sampling against plain formulas, row by row and in company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.checkpoint import Tokenizer, open_checkpoint
from headrace.core import Request, SamplingParams, Sequence
from headrace.engine.generation import Generation
from headrace.engine.sampling import keep_nucleus, read_probabilities, sample

VOCABULARY = 2000
DRAWS = 400


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return open_checkpoint(str(tiny_model)).tokenizer()


def make_generation(tokenizer: Tokenizer, name: str = "row", **params: Any) -> Generation:
    request = Request(name, (5, 6, 7), SamplingParams(**params))
    return Generation(Sequence(request, 0, 0, [5, 6, 7]), tokenizer, 0, None)


def choose(logits: torch.Tensor, generations: list[Generation]) -> list[int]:
    return [choice[0] for choice in sample(logits.clone(), generations, frozenset({2}))]  # type: ignore[index]


def drawn_tokens(tokenizer: Tokenizer, logits: torch.Tensor, **params: Any) -> list[int]:
    generations = [make_generation(tokenizer, str(index), **params) for index in range(DRAWS)]
    return choose(logits.expand(DRAWS, -1), generations)


def test_greedy_takes_the_likeliest(tokenizer: Tokenizer) -> None:
    logits = torch.randn(4, VOCABULARY)
    assert choose(logits, [make_generation(tokenizer)] * 4) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-50, 1e-38, 1e-6])
@pytest.mark.parametrize("params", [{}, {"top_k": 7}, {"top_p": 0.3}, {"min_p": 0.2}])
def test_hardly_any_temperature_is_none(tokenizer: Tokenizer, temperature: float, params: dict[str, Any]) -> None:
    logits = torch.randn(VOCABULARY).clamp(max=2)  # several are the likeliest
    assert set(drawn_tokens(tokenizer, logits, temperature=temperature, **params)) == {int(logits.argmax())}


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 7},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_k": 50, "top_p": 0.5},
        {"min_p": 0.2},
        {"top_k": 3, "min_p": 0.01},
    ],
)
def test_filters_draw_only_what_they_allow_and_all_of_it(tokenizer: Tokenizer, params: dict[str, Any]) -> None:
    torch.manual_seed(1)
    logits = torch.randn(VOCABULARY) * 3
    allowed = slow_filter(logits, **params)
    drawn = drawn_tokens(tokenizer, logits, temperature=1.0, **params)
    assert set(drawn) <= set(torch.nonzero(allowed).flatten().tolist())
    likely = [int(token) for token in torch.nonzero(allowed > 8 / DRAWS).flatten()]
    assert set(likely) <= set(drawn)


def slow_filter(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """Probabilities after min_p, top_k, top_p, one token at a time."""
    probabilities = logits.softmax(-1).tolist()
    kept = [p if p >= min_p * max(probabilities) else 0.0 for p in probabilities]
    order = sorted(range(len(kept)), key=lambda token: -kept[token])[: top_k or None]
    total, mass, result = sum(kept[token] for token in order), 0.0, torch.zeros(len(kept))
    for token in order:
        if mass >= top_p * total:
            break
        result[token] = kept[token]
        mass += kept[token]
    return result / result.sum()


def test_frequencies_follow_the_distribution(tokenizer: Tokenizer) -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    drawn = drawn_tokens(tokenizer, logits, temperature=1.0)
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / DRAWS
    assert torch.allclose(shares, logits.exp(), atol=0.08)


def test_a_row_draws_the_same_in_any_company(tokenizer: Tokenizer) -> None:
    torch.manual_seed(2)
    logits = torch.randn(12, VOCABULARY)
    settings = [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.999}, {"top_k": 40, "top_p": 0.7}] * 2

    def generation(row: int) -> Generation:
        return make_generation(tokenizer, str(row), temperature=0.8, **settings[row])

    together = choose(logits, [generation(row) for row in range(12)])
    alone = [choose(logits[row : row + 1], [generation(row)])[0] for row in range(12)]
    assert together == alone
    generations = [generation(row) for row in range(12)]
    for row, probabilities in enumerate(read_probabilities(logits, list(range(12)), generations)):
        assert torch.equal(probabilities, read_probabilities(logits, [row], generations)[0])


def test_the_seed_decides_or_the_id_where_there_is_none(tokenizer: Tokenizer) -> None:
    logits = torch.zeros(1, VOCABULARY)

    def draw(name: str, **own: int) -> int:
        return choose(logits, [make_generation(tokenizer, name, temperature=1.0, **own)])[0]

    assert draw("a", seed=1) == draw("a", seed=1) == draw("b", seed=1)
    assert len({draw("a", seed=seed) for seed in range(12)}) > 8
    assert draw("a") == draw("a")
    assert len({draw(name) for name in "abcdefghijkl"}) > 8


def test_a_flat_nucleus_wider_than_the_candidates_is_exact(tokenizer: Tokenizer) -> None:
    drawn = drawn_tokens(tokenizer, torch.zeros(VOCABULARY), temperature=1.0, top_p=0.95)
    assert max(drawn) > 1024


def test_penalties_bias_and_minimum_length(tokenizer: Tokenizer) -> None:
    logits = torch.zeros(1, 8)
    logits[0, 5], logits[0, 2], logits[0, 3] = 2.0, 3.0, 1.5
    assert choose(logits, [make_generation(tokenizer)]) == [2]
    assert choose(logits, [make_generation(tokenizer, min_tokens=1)]) == [5]
    assert choose(logits, [make_generation(tokenizer, min_tokens=1, repetition_penalty=2.0)]) == [3]
    assert choose(logits, [make_generation(tokenizer, logit_bias={1: 50})]) == [1]
    said = make_generation(tokenizer, frequency_penalty=1.0, presence_penalty=0.6)
    said.append(2, None, room=9)
    assert choose(logits, [said]) == [5]


def test_logprobs_are_the_models_own(tokenizer: Tokenizer) -> None:
    logits = torch.randn(1, VOCABULARY)
    generation = make_generation(tokenizer, logprobs=3, logit_bias={9: 100})
    ((token, logprob),) = sample(logits.clone(), [generation], frozenset())  # type: ignore[misc]
    expected = logits[0].log_softmax(-1)
    assert token == 9 and logprob is not None and logprob.logprob == pytest.approx(float(expected[9]))
    assert [entry[0] for entry in logprob.top] == expected.topk(3).indices.tolist()


def test_nucleus_keeps_the_token_that_crosses() -> None:
    kept = keep_nucleus(torch.tensor([0.5, 0.3, 0.2]), SamplingParams(top_p=0.6))
    assert kept.tolist() == pytest.approx([0.5, 0.3, 0.0])
