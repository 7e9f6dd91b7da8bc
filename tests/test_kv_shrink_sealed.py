"""Prompts that are made smaller and then rounded: what lies in sealed blocks, and what memory that leaves."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import make_tiny_model

from headrace import LLM
from headrace.cache.policies.choice import make_policy
from headrace.core import Sequence
from headrace.judge.driver import CacheDriver
from headrace.kernels.contexts import read_blocks
from headrace.kernels.units import pack_units

CHANGES = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "num_hidden_layers": 4}
PROMPT = [random.Random(0).randrange(3, 300) for _ in range(333)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = make_tiny_model(tmp_path_factory.mktemp("model") / "model", **CHANGES)
    return LLM(str(folder), precision="fp32", threads=2)


def read_prompt(llm: LLM, kv: str, prompt: list[int] = PROMPT) -> tuple[CacheDriver, Sequence, torch.Tensor]:
    driver = CacheDriver(llm.engine.model, make_policy(kv), 32, 1, 1024)
    sequence = driver.start(prompt)
    return driver, sequence, driver.read(sequence)


@pytest.mark.parametrize("shrinking", ["snapkv(keep=0.4)", "scissorhands(keep=0.5)", "streaming(keep=100)", "h2o"])
def test_what_is_kept_of_a_prompt_is_what_is_sealed(shrinking: str, llm: LLM) -> None:
    exact, kept, hidden = read_prompt(llm, shrinking)
    rounded, sealed, same = read_prompt(llm, f"{shrinking} + kivi(k=4, v=2)")
    assert torch.equal(hidden, same), "a prompt is read exactly until it is complete"
    assert kept.dropped == sealed.dropped > 0
    for ours, theirs in zip(rounded.cache.layers, exact.cache.layers, strict=True):
        assert ours.sealed is not None and ours.form is not None
        whole = slice(kept.dropped, len(PROMPT) // 32)
        expected = pack_units(*read_blocks(theirs, torch.tensor(kept.tables[theirs.group][whole])), ours.form)
        found = ours.sealed[sealed.tables[ours.sealed_group][whole]].transpose(0, 1).reshape(expected.shape)
        assert torch.equal(found, expected)


def test_memory_falls_once_a_prompt_is_complete(llm: LLM) -> None:
    found = {}
    for kv in ("plain", "snapkv(keep=0.25)", "snapkv(keep=0.25) + kivi(k=4, v=4)"):
        driver, _, _ = read_prompt(llm, kv, 3 * PROMPT)
        found[kv] = driver.used_bytes
    plain, shrunk, both = found.values()
    assert shrunk < 0.4 * plain and both < 0.5 * shrunk


def test_a_prompt_that_loses_nothing_is_rounded_too(llm: LLM) -> None:
    driver, sequence, _ = read_prompt(llm, "tova(keep=100000) + kivi(k=2, v=2)")
    assert sequence.dropped == 0
    tail = [group.window for group in driver.cache.layout.groups if group.keeps_prompts]
    assert tail and all(
        table[0] < 0 for table, group in zip(sequence.tables, driver.cache.layout.groups, strict=True) if group.window
    )
    assert bool(driver.feed([(sequence, [7])]).isfinite().all())
