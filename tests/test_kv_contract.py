"""What every KV policy must keep to, whatever it does to keys and values. A new policy adds a line to EXAMPLES."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_model

from headrace.cache.checks import check_ledger
from headrace.cache.policies.choice import POLICIES, make_policy, spell_policy
from headrace.core import Chunk, InputError, SamplingParams, Sequence
from headrace.engine.batch import build_batch
from headrace.judge.driver import CacheDriver
from headrace.llm import LLM

# By policy: settings that lose something on short texts, and settings that lose nothing.
EXAMPLES = {
    "plain": ("plain", "plain"),
    "kivi": ("kivi(k=2, v=2)", "kivi(residual=4096)"),
    "infllm": ("infllm(topk=1, init=1, local=1)", "infllm(topk=1000)"),
    "shadowkv": ("shadowkv(rank=24, budget=32, outliers=1, local=8)", "shadowkv(budget=100000)"),
    "streaming": ("streaming(keep=0.5)", "streaming(keep=100000)"),
    "tova": ("tova(keep=0.5)", "tova(keep=100000)"),
    "snapkv": ("snapkv(keep=0.5)", "snapkv(keep=100000)"),
    "h2o": ("h2o(keep=0.5)", "h2o(keep=100000)"),
    "scissorhands": ("scissorhands(keep=0.5)", "scissorhands(keep=100000)"),
    "kvmerger": ("kvmerger(keep=0.5)", "kvmerger(keep=100000)"),
    "minicache": ("minicache(start=2)", "minicache(start=4)"),
    "bfp": ("bfp(v=2)", "bfp(residual=4096)"),
    "random": ("random(keep=0.5)", "random(keep=100000)"),
}
LOSSY = {name: examples[0] for name, examples in EXAMPLES.items()} | {
    "first": "kivi(k=2, v=2, first=50)",
    "sealed": "scissorhands(keep=0.5) + kivi(k=4, v=4)",
    "pairs": "minicache(start=2, residual=64) + kivi(k=4, v=4)",
    "chosen": "infllm(topk=1, init=1, local=2) + kivi(k=4, v=4)",
    "merged": "kvmerger(keep=0.5) + kivi(k=4, v=4)",
}
# Output too is made smaller again and again.
AGAIN = {
    name: f"{name}(keep=100, every=32)" for name in ("streaming", "tova", "snapkv", "h2o", "scissorhands", "random")
} | {"kvmerger": "kvmerger(keep=0.5, every=64)"}
LOSSLESS = {name: examples[1] for name, examples in EXAMPLES.items()} | {
    "sealed": "snapkv(keep=100000) + kivi(residual=4096)",
    # Every token of each pair is kept as it is.
    "pairs": "minicache(start=0, keep=1)",
    "again": "h2o(keep=100000, every=32)",
    "chosen": "infllm(topk=1000, local=129) + kivi(residual=4096)",
    "merged": "kvmerger(keep=100000) + kivi(residual=4096)",
}
# Groups of three query heads, heads of 64.
CHANGES = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "num_hidden_layers": 4}
LENGTHS = [3, 40, 96, 97, 130, 300]

# Tokens and their log probabilities.
Answer = tuple[list[int], list[float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("kv") / "model", **CHANGES)


def make_prompts() -> list[list[int]]:
    source = random.Random(3)
    shared = [source.randrange(3, 300) for _ in range(70)]
    prompts = [[source.randrange(3, 300) for _ in range(length)] for length in LENGTHS]
    return prompts + [shared + prompt[:30] for prompt in prompts[1:4]]


def open_model(folder: Path, kv: str, **settings: object) -> LLM:
    return LLM(str(folder), kv=kv, precision="fp32", threads=2, **settings)  # type: ignore[arg-type]


def answer(llm: LLM, prompts: list[list[int]], length: int = 40) -> list[Answer]:
    params = SamplingParams(max_tokens=length, ignore_eos=True, logprobs=0)
    return [each for (each,) in choose(llm, prompts, params)]


def choose(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[Answer]]:
    """The choices of each prompt."""
    outputs = llm.generate(prompts, params, progress=False)  # type: ignore[arg-type]
    return [
        [(list(each.token_ids), [one.logprob for one in each.logprobs or []]) for each in output.outputs]
        for output in outputs
    ]


def check_empty(llm: LLM) -> None:
    """Nothing is held once nothing runs."""
    ledger = llm.engine.state.ledger
    check_ledger(ledger, [])
    assert ledger.used_blocks == 0


def test_every_policy_is_here() -> None:
    assert EXAMPLES.keys() == POLICIES.keys()


@pytest.fixture(scope="module")
def plain_answers(folder: Path) -> Iterator[list[Answer]]:
    with open_model(folder, "plain") as llm:
        yield answer(llm, make_prompts())


@pytest.mark.parametrize("kv", LOSSLESS.values(), ids=LOSSLESS)
def test_lossless_settings_are_the_plain_cache_bit_for_bit(kv: str, folder: Path, plain_answers: list[Answer]) -> None:
    with open_model(folder, kv) as llm:
        assert answer(llm, make_prompts()) == plain_answers
        check_empty(llm)


@pytest.mark.parametrize("kv", [*LOSSY.values(), *AGAIN.values()])
def test_an_answer_is_the_same_alone_and_in_any_batch_and_chunk(kv: str, folder: Path) -> None:
    prompts = make_prompts()
    with open_model(folder, kv) as llm:
        together = answer(llm, prompts)
        assert answer(llm, prompts[::-1])[::-1] == together
        assert [answer(llm, [prompt])[0] for prompt in prompts] == together
        check_empty(llm)
    with open_model(folder, kv, step_tokens=48, max_sequences=4) as llm:
        assert [tokens for tokens, _ in answer(llm, prompts)] == [tokens for tokens, _ in together]
        check_empty(llm)


@pytest.mark.parametrize("kv", LOSSY.values(), ids=LOSSY)
def test_choices_of_a_prompt_are_the_same_where_they_share_it(kv: str, folder: Path) -> None:
    prompts = make_prompts()[4:6]
    forked = SamplingParams(n=2, max_tokens=20, ignore_eos=True, logprobs=0, temperature=1.0, seed=1)
    with open_model(folder, kv) as llm:
        together = choose(llm, prompts, forked)
        shares = llm.engine.cache.layout.shares_prefixes
        assert (llm.engine.counters.cached_prompt_tokens >= sum(map(len, prompts)) - 2 * 32) == shares
        check_empty(llm)
    with open_model(folder, kv, prefix_cache=False) as llm:
        assert [choose(llm, [prompt], forked)[0] for prompt in prompts] == together
        check_empty(llm)
    assert all(first[0] != second[0] for first, second in together)


@pytest.mark.parametrize("kv", [*LOSSY.values(), *AGAIN.values()])
def test_an_answer_is_the_same_after_preemption(kv: str, folder: Path) -> None:
    prompts = make_prompts()
    with open_model(folder, kv) as llm:
        expected = answer(llm, prompts, 150)
        ledger = llm.engine.state.ledger
        needed = ledger.layout.blocks_for(max(LENGTHS) + 150, 64, max(LENGTHS)) * ledger.layout.block_bytes
    with open_model(folder, kv, kv_cache_bytes=2 * needed, admission="aggressive", step_tokens=64) as llm:
        tokens = [each for each, _ in answer(llm, prompts, 150)]
        assert llm.engine.counters.preemptions > 0
        check_empty(llm)
    assert tokens == [each for each, _ in expected]


@pytest.mark.parametrize("kv", LOSSY.values(), ids=LOSSY)
def test_what_was_taken_back_leaves_no_trace(kv: str, folder: Path) -> None:
    source = random.Random(5)
    prompt, output, wrong = ([source.randrange(3, 300) for _ in range(count)] for count in (130, 90, 40))
    with open_model(folder, kv) as llm:
        driver = CacheDriver(llm.engine.model, make_policy(kv), 32, 2, 400)
        straight, drafting = driver.start(prompt), driver.start(prompt)
        for sequence in (straight, drafting):
            driver.read(sequence)
        for place, token in enumerate(output):
            if place % 20 == 0:
                draft(driver, drafting, wrong[: 7 + place % 33])
            assert torch.equal(driver.feed([(straight, [token])]), driver.feed([(drafting, [token])]))


def draft(driver: CacheDriver, sequence: Sequence, tokens: list[int]) -> None:
    """Compute tokens that are refused then."""
    before = sequence.computed
    sequence.tokens.extend(tokens)
    driver.ledger.grow(sequence, len(sequence.tokens))
    batch = build_batch([(Chunk(sequence.number, before, len(tokens)), sequence)], driver.cache.layout, "cpu")
    with torch.inference_mode():
        driver.model.forward(batch, driver.cache)
    sequence.computed += len(tokens)
    driver.ledger.truncate(sequence, before)
    del sequence.tokens[-len(tokens) :]


@pytest.mark.parametrize("kv", LOSSY.values(), ids=LOSSY)
def test_parts_of_a_block_lie_within_it_and_apart(kv: str, folder: Path) -> None:
    with open_model(folder, kv) as llm:
        cache, taken = llm.engine.cache, {}
        begin = cache.arena.data_ptr()
        for layer in cache.layers:
            exact, sealed = [layer.keys, layer.values, layer.bias, layer.mass], [layer.sealed, layer.sealed_bias]
            (exact if layer.sealed is None else sealed).append(layer.extra)
            for group, parts in ((layer.group, exact), (layer.sealed_group, sealed)):
                for part in parts:
                    if part is not None:
                        start = part.data_ptr() - begin
                        taken.setdefault(group, []).append((start, start + part[0].numel() * part.itemsize))
        assert taken.keys() == set(range(len(cache.layout.groups)))
        for ranges in taken.values():
            ends = [0, *(end for _, end in sorted(ranges))]
            assert all(start >= before for (start, _), before in zip(sorted(ranges), ends, strict=False))
            assert ends[-1] <= cache.layout.block_bytes


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="pages are read from /proc/self/smaps")
@pytest.mark.parametrize("kv", [*LOSSY.values(), *AGAIN.values()])
def test_the_arena_takes_no_more_memory_than_is_counted(kv: str, folder: Path) -> None:
    with open_model(folder, kv, prefix_retain_bytes=0) as llm:
        answer(llm, make_prompts())
        resident, counted = read_resident(llm.engine.cache.arena), llm.engine.counters.kv_peak_bytes
    # What is begun counts whole, and sealed blocks have room to spare; the arena's ends may lie half outside a page.
    assert 0.85 * counted < resident <= 1.03 * counted + 2 * 4096


def read_resident(arena: torch.Tensor) -> int:
    """Bytes in memory of the mappings that hold the arena."""
    begin, end, found, within = arena.data_ptr(), arena.data_ptr() + arena.nbytes, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, last = (int(address, 16) for address in name.split("-"))
            within = first < end and last > begin
        elif within and name == "Rss:":
            found += int(rest[0]) * 1024
    return found


@pytest.mark.parametrize(
    ("kv", "said"),
    [
        ("kivy", "there is no policy 'kivy'; there are plain, kivi"),
        ("kivi(bits=4)", "kivi has no parameter 'bits'; it has k, v, residual, first"),
        ("kivi(k=3)", "k must be one of 2, 4, 8, got 3"),
        ("kivi(k=print(1))", "k must be a number or a text in quotes"),
        ("kivi(4)", "cannot be read"),
        ("kivi(k=4", "cannot be read"),
        ("__import__('os').system('true')", "cannot be read"),
        ("snapkv(keep=-1)", "keep must be a number"),
    ],
)
def test_a_wrong_expression_says_what_is_wrong(kv: str, said: str) -> None:
    with pytest.raises(InputError) as failure:
        make_policy(kv)
    assert said in str(failure.value)


@pytest.mark.parametrize(
    ("kv", "spelled", "whole"),
    [
        (" plain", "plain", "plain"),
        ("kivi()", "kivi", "kivi(k=4, v=4, residual=32, first=0)"),
        ("kivi( v=4,k = 4 )", "kivi(k=4, v=4)", "kivi(k=4, v=4, residual=32, first=0)"),
        (
            "tova(every=32,keep=0.50)+kivi(v=2)",
            "tova(keep=0.5, every=32) + kivi(v=2)",
            "tova(keep=0.5, every=32) + kivi(k=4, v=2, residual=32, first=0)",
        ),
        ("bfp(sort=False)", "bfp(sort=False)", "bfp(mantissa=4, block=32, v=4, sort=False, residual=32)"),
    ],
)
def test_equal_policies_are_spelled_alike(kv: str, spelled: str, whole: str) -> None:
    assert spell_policy(kv) == spell_policy(spelled) == spelled
    assert spell_policy(kv, whole=True) == spell_policy(whole) == whole
    with pytest.raises(InputError, match="there is no policy 'kivy'"):
        spell_policy(f"{kv} + kivy")
