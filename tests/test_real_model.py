"""SmolLM2-135M itself: the same greedy tokens as transformers, in any company."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared_data
from transformers import AutoModelForCausalLM

from headrace import LLM, SamplingParams

PROMPTS = 20
TOKENS = 64


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(str(smollm2_path), precision="fp32", kv_cache_bytes=1 << 30) as opened:
        yield opened


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    """Real texts: code to complete, and questions through the chat template."""
    code = [
        json.loads(line)["prompt"] for line in shared_data("human_eval.jsonl").read_text().splitlines()[: PROMPTS // 2]
    ]
    turns = [
        json.loads(line)["turns"][0]
        for line in shared_data("spec_bench.jsonl").read_text().splitlines()[:: 480 // (PROMPTS // 2)]
    ]
    chats = [llm.tokenizer.render_chat([{"role": "user", "content": turn[:1200]}]) for turn in turns[: PROMPTS // 2]]
    return [llm.tokenizer.encode(text) for text in code] + [llm.tokenizer.encode(text, special=False) for text in chats]


@pytest.fixture(scope="module")
def oracle(smollm2_path: Path) -> Any:
    """transformers' own reading of the same file."""
    return AutoModelForCausalLM.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32)


def test_greedy_tokens_equal_transformers(llm: LLM, prompts: list[list[int]], oracle: Any) -> None:
    """Each token is the oracle's choice after those before it, which is what greedy decoding means."""
    assert len(prompts) == PROMPTS
    ends = llm.tokenizer.eos_token_ids
    for prompt, output in zip(prompts, llm.generate(prompts, SamplingParams(max_tokens=TOKENS)), strict=True):
        found = output.outputs[0].token_ids
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + found]), logits_to_keep=len(found) + 1).logits[0, :-1]
        assert found == logits.argmax(-1).tolist()
        assert found[-1] in ends or len(found) == TOKENS
        assert not ends & set(found[:-1])


def test_alone_and_together_are_the_same_bytes(llm: LLM, prompts: list[list[int]]) -> None:
    params = [
        SamplingParams(max_tokens=24, temperature=temperature, logprobs=2)
        for temperature in (0.0, 0.8) * (PROMPTS // 2)
    ]
    together = llm.generate(prompts, params)
    for index in (0, 7, 19):
        (alone,) = llm.generate([prompts[index]], params[index])
        if params[index].greedy:
            assert alone.outputs[0] == together[index].outputs[0]
    again = llm.generate(prompts[:8], params[:8])
    assert [each.outputs for each in again] == [each.outputs for each in together[:8]]


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_a_row_says_the_same_in_any_company(smollm2_path: Path, prompts: list[list[int]], precision: Any) -> None:
    params = SamplingParams(max_tokens=16, logprobs=1)
    settings = {"precision": precision, "kv_cache_bytes": 1 << 28}
    with LLM(str(smollm2_path), **settings) as one, LLM(str(smollm2_path), step_tokens=100, **settings) as other:
        together = [each.outputs[0] for each in one.generate(prompts, params)]
        shuffled = [each.outputs[0] for each in other.generate(prompts[::-1], params)]
        assert shuffled[::-1] == together
        for index in (0, 7, 19):
            assert one.generate([prompts[index]], params)[0].outputs[0] == together[index]


def test_scores_equal_transformers(llm: LLM, prompts: list[list[int]], oracle: Any) -> None:
    (scored,) = llm.score([prompts[0]])
    with torch.inference_mode():
        logprobs = oracle(torch.tensor([prompts[0]])).logits[0].log_softmax(-1)
    expected = [float(logprobs[place, token]) for place, token in enumerate(prompts[0][1:])]
    assert scored.logprobs[1:] == pytest.approx(expected, abs=2e-3)
