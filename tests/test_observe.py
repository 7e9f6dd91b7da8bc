"""What shrinking policies need of kernels, how much attention tokens get and tokens moved, against plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_sealed import make_batch
from torch import Tensor

from headrace.cache.paged import PagedCache
from headrace.cache.policies.base import KVShape
from headrace.cache.policies.choice import make_policy
from headrace.kernels import _cpu
from headrace.kernels.base import AttentionSpec, LayerCache, RaggedBatch
from headrace.kernels.cpu import CpuKernels
from headrace.kernels.reference import ReferenceKernels

SIZE = 32
DTYPES = [torch.float32, torch.bfloat16]
# Tokens of a sequence, those of its chunk, where it begins, and from where its queries count.
CASES = [
    (70, 70, 0, 0),
    (70, 1, 0, 0),
    (100, 37, 32, 80),
    (64, 20, 0, -1),
    (300, 130, 64, 290),
    (33, 33, 0, 33),
    (9, 2, 0, 7),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_cache(batch: RaggedBatch, kv_heads: int, head: int, dtype: torch.dtype, kv: str = "kvmerger") -> LayerCache:
    """One layer of a policy's own cache, full of random numbers."""
    blocks = int(batch.block_tables[0].max()) + 1
    cache = PagedCache(KVShape((None,), kv_heads, head, dtype), make_policy(kv), SIZE, blocks, "cpu").layers[0]
    assert cache.mass is not None
    for part in (cache.keys, cache.values, cache.bias, cache.mass):
        if part is not None:
            part.copy_(torch.randn(part.shape))
    return cache


def copy_plane(plane: Tensor) -> Tensor:
    return torch.empty_strided(plane.shape, plane.stride(), dtype=plane.dtype).copy_(plane)


def copy_cache(cache: LayerCache) -> LayerCache:
    """The same numbers, with a mass of its own: copies lie as the originals do."""
    assert cache.mass is not None
    return replace(cache, mass=copy_plane(cache.mass))


def make_observed(cases: list[tuple[int, int, int, int]]) -> RaggedBatch:
    batch = make_batch([case[:2] for case in cases], SIZE, [case[2] for case in cases])
    return replace(batch, observed=torch.tensor([case[3] for case in cases]).int())


def read_mass(cache: LayerCache, batch: RaggedBatch, sequence: int, begin: int) -> Tensor:
    assert cache.mass is not None
    context = int(batch.context_lengths[sequence])
    blocks = batch.block_tables[0][sequence, begin // SIZE : -(-context // SIZE)].long()
    return cache.mass[blocks].transpose(0, 1).flatten(1)[:, : context - begin]


@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head"), [(9, 3, 64), (4, 1, 256), (2, 2, 32)])
@pytest.mark.parametrize("share", [0.0, 1e-3])
def test_mass_is_that_of_plain_torch(
    share: float, heads: int, kv_heads: int, head: int, dtype: torch.dtype, instruction_set: str
) -> None:
    batch = make_observed(CASES)
    for spec in (AttentionSpec(head**-0.5), AttentionSpec(head**-0.5, soft_cap=3.0)):
        cache = make_cache(batch, kv_heads, head, dtype, "h2o" if spec.soft_cap else "kvmerger")
        plain, fast = copy_cache(cache), copy_cache(cache)
        queries = torch.randn(len(batch.positions), heads, head).to(dtype)
        ReferenceKernels().observe(queries, plain, batch, spec, share)
        CpuKernels(instruction_set).observe(queries, fast, batch, spec, share)
        for sequence, (context, chunk, begin, first) in enumerate(CASES):
            mine, theirs = (read_mass(each, batch, sequence, begin) for each in (fast, plain))
            # A weight that is just the average may count with one and not with the other.
            apart = ((mine - theirs).abs() > 1e-3 + 1e-3 * theirs.abs()).sum()
            assert int(apart) <= (mine.numel() // 200 if share else 0)
            untouched = read_mass(cache, batch, sequence, begin)
            if not 0 <= first < context:
                assert torch.equal(mine, untouched)
            elif not share and first >= context - chunk:
                counted = context - first
                assert float(mine.sum()) == pytest.approx(counted * heads, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 1e-3])
@pytest.mark.parametrize("cuts", [(1, 64, 65, 66, 130, 199), (150,), tuple(range(1, 200))], ids=["some", "one", "all"])
def test_mass_has_the_same_bits_in_any_chunks_and_company(
    cuts: tuple[int, ...], share: float, dtype: torch.dtype
) -> None:
    spec, kernels, first = AttentionSpec(0.2), CpuKernels(), 70
    whole = make_observed([(200, 200, 0, first)])
    cache = make_cache(whole, 3, 64, dtype)
    queries = torch.randn(200, 9, 64).to(dtype)
    expected = copy_cache(cache)
    kernels.observe(queries, expected, whole, spec, share)
    found = copy_cache(cache)
    for start, end in zip((0, *cuts), (*cuts, 200), strict=True):
        part = make_observed([(end, end - start, 0, first)])
        table = whole.block_tables[0]
        # Another sequence with the same blocks, of which nothing is counted.
        both = make_observed([(end, end - start, 0, first), (200, 3, 0, -1)])
        beside = torch.cat([queries[start:end], torch.randn(3, 9, 64).to(dtype)])
        if start % 2:
            kernels.observe(queries[start:end], found, replace(part, block_tables=(table,)), spec, share)
        else:
            kernels.observe(beside, found, replace(both, block_tables=(table.expand(2, -1).contiguous(),)), spec, share)
    assert torch.equal(read_mass(found, whole, 0, 0), read_mass(expected, whole, 0, 0))


def test_a_mass_that_lies_elsewhere_is_refused() -> None:
    batch = make_observed(CASES)
    cache = make_cache(batch, 3, 64, torch.float32)
    assert cache.mass is not None
    wrong = replace(cache, mass=cache.mass.clone())
    with pytest.raises(ValueError, match="mass must lie in their block"):
        CpuKernels().observe(torch.randn(len(batch.positions), 9, 64), wrong, batch, AttentionSpec(0.1))


@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", [64, 256])
def test_moved_tokens_are_those_of_plain_torch(head: int, dtype: torch.dtype, instruction_set: str) -> None:
    batch = make_observed([(200, 1, 0, -1), (90, 1, 0, -1)])
    cache = make_cache(batch, 3, head, dtype)
    blocks = batch.block_tables[0][0, :7]
    slots = torch.stack([torch.randperm(200)[:75].sort().values for _ in range(3)])
    plain, fast = (replace(cache, keys=copy_plane(cache.keys), values=copy_plane(cache.values)) for _ in range(2))
    ReferenceKernels().move_tokens(plain, blocks, slots, 125)
    # A cache's keys and values lie together: the kernel is told of one stride for both.
    CpuKernels(instruction_set).move_tokens(fast, blocks, slots, 125)
    assert not torch.equal(plain.keys, cache.keys)
    assert torch.equal(plain.keys, fast.keys) and torch.equal(plain.values, fast.values)
