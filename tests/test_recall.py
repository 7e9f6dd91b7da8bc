"""Chunks that a query chooses of a prompt's shadow: the C++ kernel against plain torch, what its result rests on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from headrace.kernels import _cpu
from headrace.kernels.base import LayerCache
from headrace.kernels.contexts import read_blocks
from headrace.kernels.cpu import CpuKernels
from headrace.kernels.reference import ReferenceKernels
from headrace.kernels.shadows import CHUNK, BlockRows, ShadowRows, choose_chunks

DTYPES = [torch.float32, torch.bfloat16]
HEADS, CHUNKS, SCALE = 3, 150, 0.125
MARKED = (0, 7, 149)


@pytest.fixture(params=_cpu.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.manual_seed(0)
    before = _cpu.threads()
    CpuKernels(request.param).set_threads(2)
    yield request.param
    CpuKernels().set_threads(before)


class Layer:
    """A shadow of CHUNKS chunks in some blocks of an arena, the places for `count` of them in others."""

    def __init__(self, size: int, head: int, dtype: torch.dtype, rank: int, count: int = 32, slow: bool = True) -> None:
        needed = HEADS * (count + CHUNKS + rank) + CHUNKS * (-(-CHUNK * rank // head) + (0 if slow else HEADS * CHUNK))
        shadowed, chosen = needed // (2 * HEADS * size) + 1, -(-count * CHUNK // size)
        order, pair = torch.randperm(shadowed + chosen + 2).int(), 4 // dtype.itemsize
        self.arena = torch.randn(len(order), 2 * HEADS * size * head).to(dtype)
        keys, values = self.arena.chunk(2, 1)
        keys, values = (
            keys.unflatten(1, (HEADS, head // pair, size, pair)),
            values.unflatten(1, (HEADS, size // pair, head, pair)),
        )
        self.values = torch.randn(HEADS, CHUNKS, CHUNK, head).to(dtype)
        self.into, blocks = order[:chosen], order[chosen : chosen + shadowed]
        self.cache, rows = LayerCache(keys, values), BlockRows.view(keys, values, blocks)
        self.shadow = ShadowRows(rows, HEADS, CHUNKS, count, rank, self.values if slow else None)
        landmarks = torch.randn(HEADS, CHUNKS, head).to(dtype)
        landmarks[:, MARKED, 0] = torch.finfo(dtype).max
        directions, coordinates = torch.randn(HEADS, rank, head), torch.randn(CHUNKS * CHUNK, rank) / rank**0.5
        self.shadow.write(landmarks, directions.to(dtype), coordinates.to(dtype), None if slow else self.values)
        angles = torch.outer(torch.arange(CHUNKS * CHUNK).float(), 100.0 ** (-torch.arange(head // 2) / head))
        self.rope = angles.cos(), angles.sin()

    def recall(self, kernels: CpuKernels | ReferenceKernels, queries: Tensor) -> Tensor:
        """The arena after that."""
        kernels.recall(queries.to(self.arena.dtype), self.cache, self.shadow, self.into, self.rope, SCALE)
        return self.arena.clone()

    def restore(self, arena: Tensor) -> None:
        self.arena.copy_(arena)

    def read_places(self) -> Tensor:
        """int64 [kv heads, count]"""
        count = self.shadow.count * HEADS
        rows = self.shadow.rows.read(0, self.shadow._count_place_rows())
        return rows.flatten().view(torch.int32)[:count].view(HEADS, -1).long() - 1


def drift(steps: int, head: int, heads: int = 9) -> Iterator[Tensor]:
    """Queries [1, heads, D], each like the one before."""
    queries = torch.randn(1, heads, head)
    for step in range(steps):
        yield queries
        queries = torch.randn_like(queries) if step == steps // 2 else queries + 0.3 * torch.randn_like(queries)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(("size", "head", "rank"), [(32, 64, 96), (16, 16, 5), (48, 80, 33), (32, 8, 24)])
def test_it_writes_what_plain_torch_does(
    size: int, head: int, rank: int, slow: bool, dtype: torch.dtype, instruction_set: str
) -> None:
    """Again and again: what is there from before is moved, and the rest of the arena stays as it is."""
    layer = Layer(size, head, dtype, rank, slow=slow)
    untouched = torch.ones(len(layer.arena), dtype=torch.bool)
    untouched[layer.into.long()] = False
    before, kept = layer.arena.clone(), 0
    for step, queries in enumerate(drift(8, head)):
        old = layer.read_places()
        fast = layer.recall(CpuKernels(instruction_set), queries)
        places, found = layer.read_places(), read_blocks(layer.cache, layer.into.long())
        layer.restore(before)
        plain = layer.recall(ReferenceKernels(), queries)
        expected = read_blocks(layer.cache, layer.into.long())
        assert torch.equal(places, layer.read_places()) and torch.equal(plain[untouched], fast[untouched])
        assert torch.equal(found[1], expected[1])
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found[0], expected[0], atol=tolerance, rtol=tolerance)
        if step:
            kept += sum(len(set(a) & set(b)) for a, b in zip(old.tolist(), places.tolist(), strict=True))
        layer.restore(fast)
    assert 0.3 < kept / (7 * HEADS * layer.shadow.count) < 0.95


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_depends_on_the_query_alone(dtype: torch.dtype, instruction_set: str) -> None:
    """Not on what was chosen before, nor on the number of threads."""
    layer, kernels = Layer(32, 64, dtype, 96), CpuKernels(instruction_set)
    fresh = layer.arena.clone()
    for history in range(4):
        *others, queries = drift(1 + 2 * history, 64)
        for each in others:
            layer.recall(kernels, each)
        kernels.set_threads(1 + history % 3)
        found = layer.recall(kernels, queries)
        layer.restore(fresh)
        assert torch.equal(layer.recall(kernels, queries), found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_chunks_it_takes_the_first(dtype: torch.dtype, instruction_set: str) -> None:
    layer = Layer(32, 64, dtype, 96)
    landmarks = layer.shadow.read_landmarks().clone()
    landmarks[:, 10:140] = landmarks[:, 10:11]
    first = layer.shadow._count_place_rows()
    layer.shadow.rows.put(torch.arange(first, first + CHUNKS * HEADS), landmarks.transpose(0, 1).flatten(0, 1))
    queries = landmarks[:, 10].repeat_interleave(3, 0)
    assert choose_chunks(queries, landmarks, 32, SCALE).tolist() == [list(range(10, 42))] * HEADS
    layer.recall(CpuKernels(instruction_set), queries[None])
    assert layer.read_places().tolist() == [list(range(10, 42))] * HEADS


def test_numbers_that_are_none_do_no_harm(instruction_set: str) -> None:
    """Some chunks are chosen, each once, of those that there are."""
    layer = Layer(32, 64, torch.float32, 96)
    for wrong in (torch.nan, torch.inf, 1e30):
        layer.recall(CpuKernels(instruction_set), torch.full((1, 9, 64), wrong))
        for places in layer.read_places().tolist():
            assert places == sorted(set(places)) and places[0] >= 0 and places[-1] < CHUNKS


def test_a_cache_whose_blocks_are_no_rows_is_refused() -> None:
    layer = Layer(32, 64, torch.float32, 96)
    with pytest.raises(ValueError, match="a block's values must follow its keys"):
        BlockRows.view(layer.cache.keys, layer.cache.values.clone(), layer.into)
