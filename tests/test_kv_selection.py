"""Reading a part of the cache: blocks chosen by head in both kernels, and what a query of InfLLM-v2 chooses."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ragged import RaggedDriver
from test_engine import answers, make_prompts, mixed_params, open_model
from test_sealed import make_batch as make_sealed_batch
from test_sealed import make_cache as make_sealed_cache
from torch import Tensor

from headrace import SamplingParams
from headrace.cache.policies.base import LayerStep
from headrace.cache.policies.choice import make_policy
from headrace.cache.policies.infllm import choose_blocks, score_blocks, view_means
from headrace.checkpoint import open_checkpoint
from headrace.core import InputError
from headrace.kernels import _cpu, choose_kernels
from headrace.kernels.base import AttentionSpec, Kernels, LayerCache, RaggedBatch, SealedForm
from headrace.kernels.contexts import read_blocks
from headrace.kernels.cpu import CpuKernels
from headrace.kernels.reference import ReferenceKernels
from headrace.kernels.units import unpack_units
from headrace.model import Model, ModelSettings, load_model

DTYPES = [torch.float32, torch.bfloat16]
NONE = torch.zeros(0, dtype=torch.int64)
SPEC = AttentionSpec(0.125)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["reference", *_cpu.instruction_sets()])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return ReferenceKernels() if request.param == "reference" else CpuKernels(request.param)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return load_model(open_checkpoint(str(tiny_model)), choose_kernels("auto", "cpu"), ModelSettings(precision="fp32"))


def make_cache(blocks: int, heads: int, size: int, dtype: torch.dtype, bias: bool = False) -> LayerCache:
    """Random exact blocks with heads of 64, laid out as in an arena: a bias lies in its block."""
    pair, half = 4 // dtype.itemsize, heads * size * 64
    arena = torch.randn(blocks, 2 * half * dtype.itemsize // 4 + heads * size)
    numbers = arena[:, : 2 * half * dtype.itemsize // 4].view(dtype)
    numbers.copy_(torch.randn(blocks, 2 * half))
    return LayerCache(
        numbers[:, :half].view(blocks, heads, 64 // pair, size, pair),
        numbers[:, half:].view(blocks, heads, size // pair, 64, pair),
        bias=arena[:, -heads * size :].view(blocks, heads, size) if bias else None,
    )


def make_batch(chunks: list[tuple[int, int]], tables: Tensor, prompts: list[int] | None = None) -> RaggedBatch:
    """Sequences of (context, chunk)."""
    positions = torch.cat([torch.arange(context - chunk, context) for context, chunk in chunks]).int()
    starts = torch.tensor([0, *(chunk for _, chunk in chunks)]).cumsum(0).int()
    contexts = torch.tensor([context for context, _ in chunks]).int()
    return RaggedBatch(
        NONE,
        positions,
        starts,
        contexts,
        (tables,),
        (NONE,),
        NONE,
        prompts=None if prompts is None else torch.tensor(prompts).int(),
    )


def attend_plainly(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """One query head [D] over keys and values [C, D]."""
    scores = keys @ query.float() * SPEC.scale
    return (scores if bias is None else scores + bias).softmax(0) @ values


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 32, 64])
def test_each_head_reads_its_own_blocks(kernels: Kernels, size: int, dtype: torch.dtype, bias: bool) -> None:
    """Contexts of 1, 5 blocks but 3 tokens, 7 blocks and one token, and a chunk of 20; 9 query heads on 3."""
    chunks = [(1, 1), (5 * size - 3, 1), (6 * size + 1, 1), (3 * size - 5, 20)]
    cache = make_cache(40, 3, size, dtype, bias)
    source = random.Random(1)
    tables = torch.full((4, 3, 7), -1, dtype=torch.int32)
    for row, (context, _) in enumerate(chunks):
        for head in range(3):
            count = -(-context // size)
            tables[row, head, :count] = torch.tensor(source.sample(range(40), count)).int()
    batch = make_batch(chunks, tables)
    queries = torch.randn(len(batch.positions), 9, 64).to(dtype)
    found = kernels.attention(queries, cache, batch, SPEC)
    row = 0
    for sequence, (context, chunk) in enumerate(chunks):
        for position in range(context - chunk, context):
            for head in range(9):
                blocks = tables[sequence, head // 3]
                blocks = blocks[blocks >= 0].long()
                keys, values = (each[head // 3, : position + 1] for each in read_blocks(cache, blocks))
                added = None if cache.bias is None else cache.bias[blocks, head // 3].flatten()[: position + 1]
                expected = attend_plainly(queries[row, head], keys, values, added)
                tolerance = 2e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(found[row, head].float(), expected, atol=tolerance, rtol=tolerance)
            row += 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_tables_for_all_heads_change_no_bit(dtype: torch.dtype) -> None:
    cache, source = make_cache(60, 3, 32, dtype), random.Random(2)
    chunks = [(300, 1), (333, 1), (70, 70), (200, 13), (310, 1)]
    tables = torch.full((5, 11), -1, dtype=torch.int32)
    for row, (context, _) in enumerate(chunks):
        tables[row, : -(-context // 32)] = torch.tensor(source.sample(range(60), -(-context // 32))).int()
    tables[4, :5] = tables[0, :5]
    batch = make_batch(chunks, tables)
    queries = torch.randn(len(batch.positions), 9, 64).to(dtype)
    each = replace(batch, block_tables=(tables[:, None].repeat(1, 3, 1),))
    fast = CpuKernels()
    assert torch.equal(fast.attention(queries, cache, each, SPEC), fast.attention(queries, cache, batch, SPEC))


def give_means(cache: LayerCache) -> LayerCache:
    _, heads, _, size, _ = cache.keys.shape
    extra = torch.zeros(len(cache.keys), size // 16 * heads * 64 * cache.keys.itemsize, dtype=torch.uint8)
    return replace(cache, extra=extra)


def mean_keys(keys: Tensor) -> dict[int, Tensor]:
    """Means of 32 keys [kv heads, C, D], one every 16, by their first token: none of fewer keys."""
    return {first: keys[:, first : first + 32].mean(1) for first in range(0, keys.shape[1] - 31, 16)}


def run_layer(
    cache: LayerCache, batch: RaggedBatch, queries: Tensor, kv: str, kernels: Kernels | None = None
) -> Tensor:
    return make_policy(kv).attend(LayerStep(0, queries, cache, batch, SPEC, kernels or CpuKernels()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 32, 64])
def test_means_are_the_same_in_any_chunks(size: int, dtype: torch.dtype) -> None:
    plain = make_cache(30, 3, size, dtype)
    context = 5 * size + 21
    tables = torch.tensor([random.Random(3).sample(range(30), 8)]).int()
    written = []
    for chunks in ([context], [1] * context, [40, 1, 1, 7, 31, context - 80]):
        cache, done = give_means(plain), 0
        for length in chunks:
            done += length
            batch = make_batch([(done, length)], tables)
            run_layer(cache, batch, torch.randn(length, 9, 64).to(dtype), "infllm")
        written.append(view_means(cache)[tables[0].long()].clone())  # [blocks, kv heads, means, D]
    assert torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])
    keys = read_blocks(plain, tables[0].long())[0][:, :context]
    for first, mean in mean_keys(keys).items():
        block, place = (first + 31) // size, (first + 31) % size // 16
        torch.testing.assert_close(written[0][block, :, place].float(), mean, atol=5e-3, rtol=5e-3)
    assert int((written[0] != 0).any(-1).any(1).sum()) == len(mean_keys(keys))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_block_scores_equal_a_search_through_all_means(size: int) -> None:
    cache, context = give_means(make_cache(30, 3, size, torch.float32)), 6 * size + 5
    tables = torch.tensor([random.Random(4).sample(range(30), 8)]).int()
    run_layer(cache, make_batch([(context, context)], tables), torch.randn(context, 9, 64), "infllm")
    seen = context - 20  # a later mean than what the query sees is there already
    query = torch.randn(1, 9, 64)
    count = -(-seen // size)
    found = score_blocks(query, cache, tables[:, :count].long(), torch.tensor([seen]), SPEC)
    means = mean_keys(read_blocks(cache, tables[0].long())[0][:, :seen])
    for head in range(3):
        stacked = torch.stack([mean[head] for mean in means.values()])
        shares = sum((stacked @ query[0, each] * SPEC.scale).softmax(0) for each in range(3 * head, 3 * head + 3))
        for block in range(count):
            touching = [
                float(share)
                for first, share in zip(means, shares, strict=True)
                if first < (block + 1) * size and first + 32 > block * size
            ]
            assert abs(float(found[0, head, block]) - max(touching, default=0.0)) < 1e-5


def test_first_and_newest_blocks_are_always_chosen() -> None:
    scores, counts = torch.rand(20, 3, 40, dtype=torch.float64), torch.randint(9, 41, (20,))
    for topk, init, local in ((3, 2, 3), (1, 0, 1), (6, 1, 1)):
        chosen = choose_blocks(scores, counts, topk, init, local)
        for row in range(20):
            count = int(counts[row])
            for head in range(3):
                places = chosen[row, head].tolist()
                assert places == sorted(set(places)) and len(places) == topk + init + local
                forced = [*range(init), *range(count - local, count)]
                rest = sorted(range(init, count - local), key=lambda place: -float(scores[row, head, place]))
                assert places == sorted(forced + rest[:topk])


def test_a_query_reads_the_blocks_it_chose(kernels: Kernels) -> None:
    """Against plain attention over the chosen tokens, in a step of prompts, outputs and outputs computed again."""
    size, chunks = 32, [(290, 1), (200, 200), (411, 30), (64, 1), (352, 1)]
    prompts = [100, 200, 390, 20, 352]
    cache, source = give_means(make_cache(60, 3, size, torch.float32)), random.Random(5)
    tables = torch.full((5, 13), -1, dtype=torch.int32)
    for row, (context, _) in enumerate(chunks):
        tables[row, : -(-context // size)] = torch.tensor(source.sample(range(60), -(-context // size))).int()
        whole = make_batch([(context, context)], tables[row : row + 1])
        run_layer(cache, whole, torch.randn(context, 9, 64), "infllm")
    batch = make_batch(chunks, tables, prompts)
    queries = torch.randn(len(batch.positions), 9, 64)
    found = run_layer(cache, batch, queries, "infllm(topk=2, init=1, local=2)", kernels)
    row = 0
    for sequence, (context, chunk) in enumerate(chunks):
        blocks = tables[sequence][tables[sequence] >= 0].long()
        keys, values = read_blocks(cache, blocks)
        for position in range(context - chunk, context):
            count = position // size + 1
            places = torch.arange(count).expand(3, -1)
            if position >= prompts[sequence] and count > 5:
                scores = score_blocks(queries[row : row + 1], cache, blocks[None], torch.tensor([position + 1]), SPEC)
                places = choose_blocks(scores[:, :, :count], torch.tensor([count]), 2, 1, 2)[0]
            for head in range(9):
                seen = (places[head // 3, :, None] * size + torch.arange(size)).flatten()
                seen = seen[seen <= position]
                expected = attend_plainly(queries[row, head], keys[head // 3, seen], values[head // 3, seen])
                torch.testing.assert_close(found[row, head], expected, atol=2e-5, rtol=2e-5)
            row += 1


def give_sealed_means(cache: LayerCache) -> LayerCache:
    """Sealed blocks are in group 1; a query reads the newest 32 tokens exactly."""
    return replace(give_means(cache), sealed_group=1, residual=32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sealed_blocks_of_each_head_are_its_own(bits: int, dtype: torch.dtype, kernels: Kernels) -> None:
    chunks = [(300, 1), (333, 1), (70, 70), (200, 13), (310, 1)]
    batch, form = make_sealed_batch(chunks, 32), SealedForm(bits, bits)
    cache = give_sealed_means(make_sealed_cache(80, 3, 64, 32, dtype, form))
    queries = torch.randn(len(batch.positions), 9, 64).to(dtype)
    # Blocks are whatever they are called: heads see the same texts in other blocks.
    tables = [torch.stack([(table + 7 * head) % 80 for head in range(3)], 1).int() for table in batch.block_tables]
    found = kernels.attention(queries, cache, replace(batch, block_tables=tuple(tables)), SPEC)
    for head in range(3):
        alone = replace(batch, block_tables=tuple(table[:, head].contiguous() for table in tables))
        expected = kernels.attention(queries, cache, alone, SPEC)
        own = slice(3 * head, 3 * head + 3)
        assert torch.equal(found[:, own], expected[:, own])


def test_a_query_reads_sealed_what_it_chose(kernels: Kernels) -> None:
    """Against plain attention over the chosen tokens: those of the newest blocks exactly, all others as sealed."""
    size, context, form = 32, 411, SealedForm(4, 4)
    cache = give_sealed_means(make_sealed_cache(60, 3, 64, size, torch.float32, form))
    nothing = torch.zeros(0, dtype=torch.int32)
    whole = replace(make_sealed_batch([(context, context)], size), filled=(nothing, nothing))
    policy = "infllm(topk=2, init=1, local=2) + kivi(k=4, v=4)"
    run_layer(cache, whole, torch.randn(context, 9, 64), policy)
    table, sealed_table = (each[0].long() for each in whole.block_tables)
    keys, values = read_blocks(cache, table)
    # Means are of exact keys.
    for first, mean in mean_keys(keys[:, :context]).items():
        block, place = sealed_table[(first + 31) // size], (first + 31) % size // 16
        torch.testing.assert_close(view_means(cache)[block, :, place], mean, atol=1e-5, rtol=1e-5)
    assert cache.sealed is not None
    units = cache.sealed[sealed_table].transpose(0, 1).flatten(1).view(3, len(sealed_table), -1)
    older_keys, older_values = unpack_units(units, form, 64)
    batch = make_sealed_batch([(context, 30)], size)
    batch = replace(batch, prompts=torch.tensor([385], dtype=torch.int32), filled=(nothing, nothing))
    queries = torch.randn(30, 9, 64)
    found = run_layer(cache, batch, queries, policy, kernels)
    for row, position in enumerate(range(context - 30, context)):
        count, places = position // size + 1, torch.arange(position // size + 1).expand(3, -1)
        if position >= 385:
            scores = score_blocks(queries[row : row + 1], cache, sealed_table[None], torch.tensor([position + 1]), SPEC)
            places = choose_blocks(scores[:, :, :count], torch.tensor([count]), 2, 1, 2)[0]
        for head in range(9):
            seen = (places[head // 3, :, None] * size + torch.arange(size)).flatten()
            seen = seen[seen <= position]
            exact = (seen >= (position - 31) // size * size)[:, None]
            read = [
                torch.where(exact, new[head // 3, seen], old[head // 3, seen])
                for new, old in ((keys, older_keys), (values, older_values))
            ]
            expected = attend_plainly(queries[row, head], read[0], read[1])
            torch.testing.assert_close(found[row, head], expected, atol=2e-2, rtol=2e-2)


class Driver(RaggedDriver):
    """Its texts are prompts only in their first part."""

    def start(self, tokens: list[int], prompt: int) -> int:
        number = self.add(tokens)
        sequence = self.sequences[number]
        sequence.request = replace(sequence.request, prompt_token_ids=tuple(tokens[:prompt]))
        return number


def make_text(length: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 300) for _ in range(length)]


def compute(model: Model, kv: str, prompt: int, lengths: list[int]) -> Tensor:
    """Logits of a text of 200 tokens, computed in chunks of these lengths."""
    driver = Driver(model, kv=kv)
    number = driver.start(make_text(200), prompt)
    return torch.cat([driver.run({number: length})[number] for length in lengths])


ONE_BY_ONE = [100] + [1] * 100


def test_reading_every_block_equals_the_plain_cache(model: Model) -> None:
    plain = compute(model, "plain", 100, ONE_BY_ONE)
    assert torch.equal(compute(model, "infllm(topk=10)", 100, ONE_BY_ONE), plain)
    assert not torch.equal(compute(model, "infllm(topk=1)", 100, ONE_BY_ONE), plain)


def test_up_to_a_threshold_all_is_read(model: Model) -> None:
    plain = compute(model, "plain", 100, ONE_BY_ONE)
    found = compute(model, "infllm(topk=1, dense=150)", 100, ONE_BY_ONE)
    assert torch.equal(found[:150], plain[:150])
    assert not torch.equal(found[150:], plain[150:])


def test_prompts_are_read_whole(model: Model) -> None:
    plain = compute(model, "plain", 200, ONE_BY_ONE)
    assert torch.equal(compute(model, "infllm(topk=1)", 200, ONE_BY_ONE), plain)


def test_an_output_is_the_same_in_any_chunk_and_beside_others(model: Model) -> None:
    kv = "infllm(topk=1, init=1, local=1)"
    alone = compute(model, kv, 100, ONE_BY_ONE)
    for lengths in ([200], [90, 20, 90], [50, 101, 49]):
        assert torch.equal(compute(model, kv, 100, lengths), alone)
    driver = Driver(model, kv=kv)
    numbers = [driver.start(make_text(200), prompt) for prompt in (100, 30, 200)]
    first = driver.run({number: 100 for number in numbers})[numbers[0]]
    rest = [driver.run({numbers[0]: 1, numbers[1]: 3 if step < 30 else 1, numbers[2]: 1}) for step in range(33)]
    assert torch.equal(torch.cat([first, *(each[numbers[0]] for each in rest)]), alone[:133])


def test_layers_with_windows_are_left_alone(model: Model) -> None:
    cache, tables = give_means(make_cache(30, 3, 32, torch.float32)), torch.randperm(30).int()[None, :8]
    batch, queries = make_batch([(250, 1)], tables, [100]), torch.randn(1, 9, 64)
    spec = AttentionSpec(0.125, window=100)
    policy = make_policy("infllm(topk=1)")
    found = policy.attend(LayerStep(0, queries, cache, batch, spec, CpuKernels()))
    assert torch.equal(found, CpuKernels().attention(queries, cache, batch, spec))


def test_answers_are_the_same_alone_chunked_and_preempted(tiny_model: Path) -> None:
    prompts, params = make_prompts(16), mixed_params(16)
    settings: dict[str, Any] = {"kv": "infllm(topk=1, init=1, local=1)"}
    with open_model(tiny_model, **settings) as roomy:
        together = answers(roomy.generate(prompts, params))
        block = roomy.engine.cache.layout.block_bytes
        assert roomy.engine.counters.cached_prompt_tokens > 0
    with open_model(tiny_model, prefix_cache=False, max_sequences=1, **settings) as one:
        assert answers(one.generate(prompts, params)) == together
    with open_model(tiny_model, step_tokens=16, **settings) as chunked:
        assert answers(chunked.generate(prompts, params)) == together
    with open_model(tiny_model, **settings) as roomy:
        long = SamplingParams(max_tokens=200, min_tokens=190)
        expected = answers(roomy.generate(prompts, long))
    with open_model(tiny_model) as plain:
        assert answers(plain.generate(prompts, long)) != expected
    with open_model(tiny_model, kv_cache_bytes=40 * block, **settings) as crowded:
        crowded.generate(make_prompts(64, 6, 20), SamplingParams(stop_token_ids=tuple(range(300))))
        assert answers(crowded.generate(prompts, long)) == expected
        assert crowded.engine.counters.preemptions > 0


@pytest.mark.parametrize(
    ("kv", "block_size", "message"),
    [
        ("infllm(topk=0)", 32, "topk must be a whole number from 1"),
        ("infllm(local=0)", 32, "local must be a whole number from 1"),
        ("infllm(dense=-1)", 32, "dense must be a whole number from 0"),
        ("infllm", 24, "needs a multiple of 16"),
        ("infllm(local=1)+kivi", 32, "local must be at least 2, got 1"),
    ],
)
def test_what_cannot_be_is_refused(model: Model, kv: str, block_size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_policy(kv).arrange(model.kv_shape, block_size)
