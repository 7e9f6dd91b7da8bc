"""ShadowKV: keys of a low rank, chunks by their landmarks, values in a file, and how long all that is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import shared_data
from test_engine import make_prompts, open_model
from test_kv_selection import NONE, attend_plainly, make_cache
from torch import Tensor

from headrace import SamplingParams
from headrace.cache.paged import PagedCache
from headrace.cache.policies.base import KVShape, LayerStep, Remembering
from headrace.cache.policies.choice import make_policy
from headrace.cache.policies.selecting import map_file
from headrace.cache.policies.shadowkv import (
    CHUNK,
    LayerShadow,
    ShadowKV,
    choose_chunks,
    part_outliers,
    reduce_rank,
)
from headrace.checkpoint import open_checkpoint
from headrace.core import Chunk, InputError, Request, Sequence
from headrace.engine.batch import build_batch
from headrace.kernels import choose_kernels
from headrace.kernels.base import AttentionSpec, LayerCache, RaggedBatch
from headrace.kernels.cpu import CpuKernels
from headrace.kernels.reference import read_blocks, rotate
from headrace.model import ModelSettings, load_model

SIZE, HEADS, HEAD = 32, 3, 64
SPEC = AttentionSpec(0.125)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_rope(length: int, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length).float(), 100.0 ** (-torch.arange(HEAD // 2) / HEAD))
    return angles.cos() * stretch, angles.sin() * stretch


def rotate_all(straight: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Keys [kv heads, N, D] of the first N positions, rotated."""
    keys = straight.transpose(0, 1).clone()
    rotate(keys, rope[0][: len(keys)], rope[1][: len(keys)])
    return keys.transpose(0, 1)


def shadow_of(keys: Tensor, rope: tuple[Tensor, Tensor], rank: int) -> LayerShadow:
    """Without outliers."""
    chunks = keys.view(HEADS, -1, CHUNK, HEAD)
    every = torch.arange(chunks.shape[1]).expand(HEADS, -1)
    return LayerShadow(*reduce_rank(keys, rope, rank), chunks.mean(2), every)


def rebuild_keys(shadow: LayerShadow, rope: tuple[Tensor, Tensor]) -> Tensor:
    return rotate_all(shadow.coordinates @ shadow.directions, rope)


@pytest.mark.parametrize("stretch", [1.0, 1.3])
def test_keys_of_full_rank_come_back(stretch: float) -> None:
    rope = make_rope(400, stretch)
    keys = rotate_all(torch.randn(HEADS, 320, HEAD), rope)
    shadow = shadow_of(keys, rope, 1000)
    assert shadow.coordinates.shape == (320, HEADS * HEAD)
    torch.testing.assert_close(rebuild_keys(shadow, rope), keys, atol=1e-4, rtol=1e-4)


def test_a_lower_rank_is_as_good_as_it_can_be() -> None:
    rope = make_rope(400)
    straight = torch.randn(HEADS, 320, 8) @ torch.randn(HEADS, 8, HEAD) + 0.1 * torch.randn(HEADS, 320, HEAD)
    singular = torch.linalg.svdvals(straight.transpose(0, 1).flatten(1))
    for rank in (4, 24, 100):
        shadow = shadow_of(rotate_all(straight, rope), rope, rank)
        found = rebuild_keys(shadow, rope)
        missed = (found - rotate_all(straight, rope)).square().sum().sqrt()
        assert float(missed) == pytest.approx(float(singular[rank:].square().sum().sqrt()), rel=1e-3)


def test_outliers_are_the_chunks_least_like_their_landmark() -> None:
    chunks = torch.randn(HEADS, 20, CHUNK, HEAD) + 3
    chunks[1, 13, 4] *= -1
    outliers, rest = part_outliers(chunks, chunks.mean(2), 3)
    for head in range(HEADS):
        likeness = [
            min(float(torch.cosine_similarity(key, chunk.mean(0), 0)) for key in chunk) for chunk in chunks[head]
        ]
        least = sorted(range(20), key=lambda place: likeness[place])[:3]
        assert outliers[head].tolist() == sorted(least)
        assert rest[head].tolist() == sorted(set(range(20)) - set(least))
    assert 13 in outliers[1].tolist()


def test_chunks_are_chosen_by_the_query_that_wants_them_most() -> None:
    keys, queries = torch.randn(HEADS, 160, HEAD), torch.randn(9, HEAD) * 3
    shadow = shadow_of(keys, make_rope(160), 16)
    found = choose_chunks(queries, shadow, 4, SPEC.scale)
    for head in range(HEADS):
        weights = [(shadow.landmarks[head] @ queries[3 * head + each] * SPEC.scale).softmax(0) for each in range(3)]
        most = torch.stack(weights).amax(0)
        assert found[head].tolist() == sorted(most.topk(4).indices.tolist())
    assert choose_chunks(queries, shadow, 20, SPEC.scale).tolist() == [list(range(20))] * HEADS


def make_batch(context: int, chunk: int, table: Tensor, begin: int = 0, shrinks: int = 0) -> RaggedBatch:
    """One sequence, number 5."""
    return RaggedBatch(
        NONE,
        torch.arange(context - chunk, context).int(),
        torch.tensor([0, chunk]).int(),
        torch.tensor([context]).int(),
        (table,),
        (NONE,),
        NONE,
        begins=torch.tensor([begin]).int() if begin else None,
        shrinks=torch.tensor([shrinks]).int() if shrinks else None,
        prompts=torch.tensor([300]).int(),
        numbers=(5,),
    )


def run_layer(policy: ShadowKV, cache: LayerCache, batch: RaggedBatch, queries: Tensor) -> Tensor:
    step = LayerStep(0, queries, cache, batch, SPEC, CpuKernels(), rope=make_rope(400))
    return policy.attend(step)


def test_an_output_reads_outliers_what_it_chose_and_all_that_is_newer() -> None:
    """A prompt of 300 tokens of which 4 blocks stay: what it chooses, an outlier chunk, the newest tokens."""
    policy = ShadowKV(rank=192, budget=60, outliers=1, local=20)
    policy.arrange(make_shape(), SIZE)
    cache, table = make_cache(12, HEADS, SIZE, torch.float32), torch.randperm(12).int()[None]
    keys, values = (each.clone() for each in read_blocks(cache, table[0].long()))
    # 64 chosen tokens and 8 of an outlier stand where the tokens from 192 on were; those from 264 on are as they were.
    begin, shadowed = 192, 264
    batch = make_batch(300, 300, table, shrinks=begin // SIZE)
    queries = torch.randn(300, 9, HEAD)
    plain = CpuKernels().attention(queries, cache, batch, SPEC)
    assert torch.equal(run_layer(policy, cache, batch, queries), plain)
    outliers, _ = part_outliers(
        keys[:, :shadowed].reshape(HEADS, -1, CHUNK, HEAD),
        keys[:, :shadowed].reshape(HEADS, -1, CHUNK, HEAD).mean(2),
        1,
    )
    layer = policy._shadows[5].layers[0]
    queries = torch.randn(4, 9, HEAD)
    one_by_one = [
        run_layer(policy, cache, make_batch(301 + step, 1, table, begin), queries[step : step + 1]) for step in range(4)
    ]
    together = run_layer(policy, cache, make_batch(304, 4, table, begin), queries)
    assert torch.equal(torch.cat(one_by_one), together)
    for step in range(4):
        chosen = torch.cat([outliers, choose_chunks(queries[step], layer, 8, SPEC.scale)], 1)
        for head in range(9):
            places = (chosen[head // 3][:, None] * CHUNK + torch.arange(CHUNK)).flatten()
            seen = torch.cat([places, torch.arange(shadowed, 301 + step)])
            expected = attend_plainly(queries[step, head], keys[head // 3, seen], values[head // 3, seen])
            torch.testing.assert_close(together[step, head], expected, atol=1e-4, rtol=1e-4)


def make_shape(dtype: torch.dtype = torch.float32) -> KVShape:
    return KVShape((None,), HEADS, HEAD, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_by_tier_are_as_computed_by_hand(dtype: torch.dtype, tmp_path: Path) -> None:
    policy = ShadowKV(rank=24, budget=64, outliers=2, local=16, folder=str(tmp_path))
    policy.arrange(make_shape(), SIZE)
    cache, table = make_cache(12, HEADS, SIZE, dtype), torch.randperm(12).int()[None]
    queries = torch.randn(300, 9, HEAD).to(dtype)
    run_layer(policy, cache, make_batch(300, 300, table, shrinks=6), queries)
    tokens, item = 6 * SIZE + 64 + 16, dtype.itemsize
    landmarks = (tokens // 8 - 2) * HEADS
    fast = tokens * 24 * item + HEADS * 24 * HEAD * item + landmarks * (HEAD * item + 8)
    assert policy.count_bytes() == {"fast": fast, "slow": tokens * HEADS * HEAD * item}
    assert list(tmp_path.iterdir()) == []
    policy.release(5)
    policy.release(6)
    assert policy.count_bytes() == {"fast": 0, "slow": 0}


def test_values_in_a_file_come_back_and_no_room_says_so(tmp_path: Path) -> None:
    numbers = map_file(str(tmp_path), 1000, torch.bfloat16)
    numbers.copy_(torch.arange(1000))
    assert torch.equal(numbers, torch.arange(1000).bfloat16())
    with pytest.raises(InputError, match="cannot be kept in"):
        map_file(str(tmp_path / "missing"), 1000, torch.float32)
    with pytest.raises(InputError, match="cannot be kept in"):
        map_file(str(tmp_path), 1 << 58, torch.float32)
    with pytest.raises(InputError, match="is no folder"):
        make_policy(f"shadowkv(folder='{tmp_path / 'missing'}')")
    with pytest.raises(InputError, match="rank must be a whole number from 1"):
        make_policy("shadowkv(rank=0)")


def test_what_is_kept_of_a_sequence_ends_with_it(tiny_model: Path) -> None:
    kv = "shadowkv(rank=8, budget=16, outliers=1, local=8)"
    prompts = make_prompts(8)
    with open_model(tiny_model, kv=kv) as llm:
        policy = llm.engine.cache.policy
        assert isinstance(policy, ShadowKV) and isinstance(policy, Remembering)
        for number, prompt in enumerate(prompts):
            llm.engine.add(Request(str(number), tuple(prompt), SamplingParams(max_tokens=30, ignore_eos=True)))
        long = [number for number, prompt in enumerate(prompts) if len(prompt) >= 16 + 16 + 8 + 8]
        while len(policy._shadows) < len(long):
            llm.engine.step()
        held = policy.count_bytes()
        llm.engine.abort(str(long[0]))
        assert len(policy._shadows) == len(long) - 1 and policy.count_bytes()["slow"] < held["slow"]
        while llm.engine.unfinished:
            llm.engine.step()
        assert policy.count_bytes() == {"fast": 0, "slow": 0}


def test_outliers_of_the_real_model_have_the_first_chunk(smollm2_path: Path) -> None:
    """Attention rests on the first token of a text: its key is unlike its neighbours' in most heads."""
    text = shared_data("wikitext2_test.txt").read_text()[:1500]
    checkpoint = open_checkpoint(str(smollm2_path))
    model = load_model(checkpoint, choose_kernels("auto", "cpu"), ModelSettings(precision="fp32", max_context=256))
    tokens = checkpoint.tokenizer().encode(text)[:256]
    policy = ShadowKV()
    cache = PagedCache(model.kv_shape, policy, 32, 8, "cpu")
    sequence = Sequence(Request("0", tuple(tokens), SamplingParams()), 0, 0, tokens, tables=[list(range(8))])
    model.forward(build_batch([(Chunk(0, 0, 256), sequence)], cache.layout, "cpu"), cache)
    layers = policy._shadows[0].layers.values()
    first = torch.stack([layer.chunks[:, 0] != 0 for layer in layers])
    assert len(first) == 30 and float(first.float().mean()) > 0.5
