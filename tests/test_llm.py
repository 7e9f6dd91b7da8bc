"""The Python face: streams one at a time, prompts that cannot be read, arguments that cannot be."""

from __future__ import annotations

import os
import platform
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headrace import LLM, SamplingParams
from headrace.core import InputError
from headrace.engine.memory import give_back_memory

MIB = 2**20
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), precision="fp32", kv_cache_bytes=4 << 20, threads=1) as llm:
        yield llm


def test_of_two_streams_the_one_that_is_read_first_runs_alone(llm: LLM) -> None:
    prompts = ["one", "two", "three"]
    alone = [each.outputs[0].token_ids for each in llm.generate(prompts, PARAMS)]
    first, second = llm.stream(prompts, PARAMS), llm.stream(["four"], PARAMS)
    speech = llm.stream_chat([{"role": "user", "content": "five"}], PARAMS)
    answers = [next(first)]
    for other in (second, speech):
        with pytest.raises(InputError, match="another stream of this LLM is unfinished"):
            next(other)  # type: ignore[call-overload]
    answers += first
    assert sorted((each.request_id, each.outputs[0].token_ids) for each in answers) == [
        (str(place), tokens) for place, tokens in enumerate(alone)
    ]
    assert llm.generate(["four"], PARAMS)[0].error is None


def test_a_prompt_that_cannot_be_read_costs_no_other(llm: LLM) -> None:
    good, bad, other = llm.generate(["one", "a lone \ud800", "two"], PARAMS)
    assert bad.error is not None and bad.outputs == []
    assert [each.outputs for each in (good, other)] == [each.outputs for each in llm.generate(["one", "two"], PARAMS)]
    talk, wrong = llm.chat([[{"role": "user", "content": "one"}], [{"role": "user", "content": "\ud800"}]], PARAMS)
    assert talk.error is None and wrong.error is not None


def test_arguments_that_cannot_be_are_refused(llm: LLM) -> None:
    with pytest.raises(InputError, match="there are more than 1 prompts"):
        list(llm.stream(iter(["one", "two"]), [PARAMS]))
    with pytest.raises(InputError, match="n must be 1, got 2"):
        llm.stream_chat([{"role": "user", "content": "one"}], SamplingParams(n=2))
    with pytest.raises(InputError, match="pooling must be one of mean, last, got 'max'"):
        llm.embed(["one"], pooling="max")  # type: ignore[arg-type]
    llm.close()
    for call in (llm.report, lambda: llm.context_length, lambda: llm.use_kv("plain", 32)):
        with pytest.raises(InputError, match="this LLM is closed"):
            call()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps what it likes")
def test_what_was_freed_goes_back_when_an_llm_is_closed(llm: LLM) -> None:
    """What kernels let the C library keep, for activations that come and go, is not kept beyond the model."""
    give_back_memory()
    before = read_resident()
    weights = [torch.ones(MIB) for _ in range(50)]
    last = torch.ones(MIB)  # what lies below it would otherwise go back at once
    weights.clear()
    assert read_resident() > before + 150 * MIB
    engine = weakref.ref(llm.engine)
    llm.close()
    assert engine() is None
    assert read_resident() < before + 50 * MIB
    assert last.sum() == MIB


def read_resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
