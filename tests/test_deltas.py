"""Answers read while they grow, and vectors of texts: against whole answers, and against transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers

from headrace import LLM, SamplingParams
from headrace.core import Request, RowError, Sequence
from headrace.engine.deltas import DeltaReader, StopBeginning
from headrace.engine.generation import Generation

TEXTS = ["The wheel turns as long as water comes", "Grinds", "day and night, and grinds what it is given. " * 5]


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(str(tiny_model), precision="fp32", block_size=16, kv_cache_bytes=4 << 20, threads=1, step_tokens=24)


@pytest.mark.parametrize("stop", [(), ("e",), ("wat", "he", "\ufffd"), ("zzzz",)])
@pytest.mark.parametrize("seed", range(6))
def test_pieces_join_to_the_final_text(llm: LLM, stop: tuple[str, ...], seed: int) -> None:
    params = SamplingParams(n=2, max_tokens=40, temperature=1.0, seed=seed, stop=stop, logprobs=1)
    tokens = tuple(llm.tokenizer.encode(TEXTS[0]))
    engine, readers = llm.engine, [DeltaReader(llm.tokenizer, params) for _ in range(2)]
    engine.add(Request("a", tokens, params))
    texts, ids, scores, ends = ["", ""], [[], []], [0, 0], ["", ""]
    output = None
    while output is None:
        output = next(iter(engine.step()), None)
        for choice in engine.peek("a") if output is None else output.outputs:
            delta = readers[choice.index].read(choice)
            if delta is None:
                continue
            texts[delta.index] += delta.text
            ids[delta.index] += delta.token_ids
            scores[delta.index] += len(delta.logprobs or [])
            ends[delta.index] += delta.finish_reason or ""
    assert texts == [choice.text for choice in output.outputs]
    assert ids == [choice.token_ids for choice in output.outputs]
    assert scores == [len(choice.token_ids) for choice in output.outputs]
    assert ends == [choice.finish_reason for choice in output.outputs]


def count_held(text: str, stop: str, step: int = 1) -> int:
    """What is held of a text that comes in pieces of so many characters."""
    beginning = StopBeginning(stop)
    for start in range(0, len(text), step):
        beginning.read(text[start : start + step])
    return beginning.length


def test_what_may_become_a_stop_is_held_back() -> None:
    assert count_held("the whee", "wheel") == 4
    assert count_held("the wheel", "wheels") == 5
    assert count_held("the", "wheel") == count_held("the wheel", "wheel") == 0
    generator = random.Random(0)
    for _ in range(2000):
        text, stop = ("".join(generator.choices("ab", k=generator.randint(1, most))) for most in (30, 9))
        expected = max(length for length in range(len(stop)) if text.endswith(stop[:length]))
        assert count_held(text, stop, generator.randint(1, 3)) == expected, (text, stop)


def test_long_stops_cost_no_more_than_short_ones() -> None:
    """With a search that begins anew at every token this takes minutes."""
    for stop in ("a" * 40_000, "a" * 20_000 + "b" * 20_000, "ab" * 20_000, "b" + "a" * 39_999):
        assert count_held("a" * 30_000 + "c", stop) == 0


@pytest.mark.parametrize(("said", "text"), [("\nqrstuv\n", "\nqrstuv"), ("abc\nabcdefgh", "abc\n")])
def test_a_stop_that_came_too_early_is_passed_over_for_good(llm: LLM, said: str, text: str) -> None:
    """However long the other stops are: what follows it may have been sent."""
    params = SamplingParams(max_tokens=40, min_tokens=5, stop=("\n", "abcdefgh"))
    generation = Generation(Sequence(Request("a", (5,), params), 0, 0, [5]), llm.tokenizer, 0, None)
    reader, pieces = DeltaReader(llm.tokenizer, params), ""
    for character in said:
        ended = generation.append(llm.tokenizer.encode(character, special=False)[-1], None, room=99)
        delta = reader.read(generation.output)
        pieces += delta.text if delta is not None else ""
    assert ended and pieces == generation.output.text == text


def test_a_chat_is_streamed_as_it_is_answered(llm: LLM) -> None:
    question = [{"role": "user", "content": "What does it grind?"}]
    params = SamplingParams(max_tokens=12)
    pieces = list(llm.stream_chat(question, params))
    assert "".join(pieces) == llm.chat(question, params)[0].outputs[0].text and len(pieces) > 1
    half = llm.stream_chat(question, params)
    next(half)
    half.close()
    assert llm.engine.unfinished == 0
    with pytest.raises(RowError, match="context"):
        list(llm.stream_chat([{"role": "user", "content": "wheel " * 3000}], params))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_those_of_transformers(llm: LLM, tiny_model: Path, pooling: str) -> None:
    oracle = transformers.AutoModel.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for text, vector in zip(TEXTS, llm.embed(TEXTS, pooling), strict=True):  # type: ignore[arg-type]
        with torch.inference_mode():
            hidden = oracle(torch.tensor([llm.tokenizer.encode(text)])).last_hidden_state[0]
        state = hidden.mean(0) if pooling == "mean" else hidden[-1]
        assert vector == pytest.approx((state / state.norm()).tolist(), abs=1e-5)


def test_a_preempted_text_is_added_once(tiny_model: Path) -> None:
    texts = [text * 4 for text in TEXTS] * 3
    settings = {"precision": "fp32", "block_size": 16, "threads": 1, "step_tokens": 24}
    with LLM(str(tiny_model), kv_cache_bytes=4 << 20, **settings) as roomy:  # type: ignore[arg-type]
        expected = roomy.embed(texts)
        bytes_each = roomy.engine.cache.layout.block_bytes
    with LLM(  # type: ignore[arg-type]
        str(tiny_model), kv_cache_bytes=70 * bytes_each, admission="aggressive", **settings
    ) as tight:
        assert tight.embed(texts) == expected
        assert tight.score(texts[0])[0].logprobs[1:] == tight.score(texts[0])[0].logprobs[1:]


def test_a_vector_is_the_same_however_its_text_is_cut(tiny_model: Path) -> None:
    texts = [" ".join(TEXTS) * 3, *TEXTS]
    found = []
    for step_tokens in (1024, 40, 7):
        with LLM(str(tiny_model), kv_cache_bytes=4 << 20, precision="fp32", threads=1, step_tokens=step_tokens) as llm:
            found.append(llm.embed(texts, pooling="mean"))
    assert found[0] == found[1] == found[2]


def test_the_model_s_configuration_says_how_to_pool(tiny_model: Path, tmp_path: Path) -> None:
    from headrace.checkpoint.pooling import read_pooling
    from headrace.core import ModelError

    assert read_pooling(tiny_model) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    config = tmp_path / "1_Pooling" / "config.json"
    config.write_text('{"word_embedding_dimension": 64, "pooling_mode_lasttoken": true}')
    assert read_pooling(tmp_path) == "last"
    config.write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(ModelError, match="cls_token is not supported"):
        read_pooling(tmp_path)
