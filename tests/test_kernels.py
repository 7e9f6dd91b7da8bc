"""The C++ kernels against plain torch, on every instruction set of this machine; in float32 a row stands alone."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from headrace.kernels import _cpu
from headrace.kernels.base import Activation, AttentionSpec, RaggedBatch
from headrace.kernels.cpu import CpuKernels
from headrace.kernels.reference import ReferenceKernels

PLAIN = ReferenceKernels()
FAST = CpuKernels()
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=_cpu.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.instruction_set()
    _cpu.use_instruction_set(request.param)
    yield request.param
    _cpu.use_instruction_set(before)


def assert_close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_an_instruction_set_that_is_not_here_is_refused() -> None:
    with pytest.raises(ValueError, match="no sse9"):
        _cpu.use_instruction_set("sse9")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 33, 7), (12, 64, 96), (13, 31, 128), (97, 100, 65), (200, 160, 48)])
def test_linear(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, out, size = shape
    x, weight, bias = torch.randn(rows, size), torch.randn(out, size) / size**0.5, torch.randn(out)
    x, weight = x.to(dtype), weight.to(dtype)
    for each in (None, bias):
        found = FAST.linear(x, FAST.pack(weight), each)
        assert_close(found, PLAIN.linear(x, PLAIN.pack(weight), each))
    assert FAST.pack(weight).out_features == out


def test_a_row_of_a_product_has_the_same_bits_in_any_batch() -> None:
    x, weight = torch.randn(150, 300), FAST.pack(torch.randn(70, 300))
    together = FAST.linear(x, weight)
    for rows in (1, 2, 3, 7, 12, 13, 96, 97, 149):
        assert torch.equal(FAST.linear(x[:rows], weight), together[:rows])
        assert torch.equal(FAST.linear(x[-rows:], weight), together[-rows:])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(FAST.linear(x, weight), together)
    torch.set_num_threads(threads)


def test_linear_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="over 8 features cannot take"):
        FAST.linear(torch.zeros(2, 9), FAST.pack(torch.zeros(4, 8)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 30, 64, 576, 1000])
def test_norms(size: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(9, size).to(dtype), torch.randn(9, size).to(dtype)
    weight = torch.randn(size)
    assert_close(FAST.rms_norm(x, weight, 1e-5), PLAIN.rms_norm(x, weight, 1e-5))
    mine, theirs = residual.clone(), residual.clone()
    assert_close(FAST.add_rms_norm(x, mine, weight, 1e-5), PLAIN.add_rms_norm(x, theirs, weight, 1e-5))
    assert_close(mine, theirs)
    heads = torch.randn(9, 5, size).to(dtype)[:, 1:3]
    assert_close(FAST.rms_norm(heads, weight, 1e-5), PLAIN.rms_norm(heads, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activation(activation: Activation, dtype: torch.dtype) -> None:
    for rows, size in ((1, 3), (7, 96), (300, 200)):
        gate_up = (torch.randn(rows, 2 * size) * 4).to(dtype)
        assert_close(FAST.gated_activation(gate_up, activation), PLAIN.gated_activation(gate_up, activation))
    extreme = torch.tensor([[-200.0, 200.0, 0.0, 1.0, 2.0, 3.0]]).to(dtype)
    assert_close(FAST.gated_activation(extreme, activation), PLAIN.gated_activation(extreme, activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", [8, 16, 64, 80, 256])
def test_rotate_in_a_fused_row(head: int, dtype: torch.dtype) -> None:
    fused = torch.randn(11, 7, head).to(dtype)
    cos, sin = torch.randn(11, head // 2), torch.randn(11, head // 2)
    mine, theirs = fused.clone(), fused.clone()
    FAST.rotate(mine[:, 2:5], cos, sin)
    PLAIN.rotate(theirs[:, 2:5], cos, sin)
    assert_close(mine, theirs)
    assert torch.equal(mine[:, :2], fused[:, :2]) and torch.equal(mine[:, 5:], fused[:, 5:])


def make_case(
    lengths: list[tuple[int, int]], kv_heads: int, head: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, RaggedBatch]:
    """A cache full of random numbers, and a batch of sequences of (context, chunk) with scattered blocks."""
    blocks = sum(-(-context // size) for context, _ in lengths)
    order = random.Random(0).sample(range(blocks), blocks)
    table = torch.full((len(lengths), max(-(-context // size) for context, _ in lengths)), -1, dtype=torch.int32)
    for row, (context, _) in enumerate(lengths):
        count = -(-context // size)
        table[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    starts = torch.tensor([0, *(chunk for _, chunk in lengths)]).cumsum(0).int()
    positions = torch.cat([torch.arange(context - chunk, context) for context, chunk in lengths]).int()
    contexts = torch.tensor([context for context, _ in lengths], dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.int64)
    keys = torch.randn(blocks, kv_heads, head, size).to(dtype)
    values = torch.randn(blocks, kv_heads, size, head).to(dtype)
    return keys, values, RaggedBatch(none, positions, starts, contexts, (table,), (none,), none)


SPECS = [
    AttentionSpec(0.2),
    AttentionSpec(0.3, window=9),
    AttentionSpec(0.3, window=40),
    AttentionSpec(0.5, soft_cap=3.0),
]
MIXED = [(1, 1), (70, 1), (33, 33), (64, 20), (100, 37), (16, 1), (17, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=["plain", "window 9", "window 40", "soft cap"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head", "size"), [(9, 3, 64, 32), (4, 4, 16, 16), (8, 1, 80, 48), (2, 1, 256, 16)]
)
def test_attention(heads: int, kv_heads: int, head: int, size: int, spec: AttentionSpec, dtype: torch.dtype) -> None:
    keys, values, batch = make_case(MIXED, kv_heads, head, size, dtype)
    queries = torch.randn(len(batch.positions), heads + 2, head).to(dtype)[:, 1 : heads + 1]
    assert_close(
        FAST.attention(queries, keys, values, batch, spec), PLAIN.attention(queries, keys, values, batch, spec)
    )


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "window 9", "window 40", "soft cap"])
def test_a_query_has_the_same_bits_in_any_chunk_and_batch(spec: AttentionSpec) -> None:
    keys, values, batch = make_case([(100, 100), (45, 45)], 3, 64, 32, torch.float32)
    queries = torch.randn(145, 9, 64)
    whole = FAST.attention(queries, keys, values, batch, spec)
    none = torch.zeros(0, dtype=torch.int64)
    for start, length in [(place, 1) for place in range(100)] + [(0, 50), (50, 50), (3, 31), (31, 69), (64, 36)]:
        part = RaggedBatch(
            none,
            torch.arange(start, start + length).int(),
            torch.tensor([0, length]).int(),
            torch.tensor([start + length]).int(),
            (batch.block_tables[0][:1],),
            (none,),
            none,
        )
        alone = FAST.attention(queries[start : start + length], keys, values, part, spec)
        assert torch.equal(alone, whole[start : start + length])


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv(dtype: torch.dtype) -> None:
    fused = torch.randn(50, 8, 24).to(dtype)
    slots = torch.tensor(random.Random(0).sample(range(6 * 32), 50))
    caches = [(torch.zeros(6, 3, 24, 32, dtype=dtype), torch.zeros(6, 3, 32, 24, dtype=dtype)) for _ in range(2)]
    for kernels, (keys, values) in zip((FAST, PLAIN), caches, strict=True):
        kernels.write_kv(fused[:, 2:5], fused[:, 5:], keys, values, slots)
    assert torch.equal(caches[0][0], caches[1][0]) and torch.equal(caches[0][1], caches[1][1])


def test_odd_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="heads must be contiguous"):
        FAST.rotate(torch.zeros(2, 8, 3).transpose(1, 2), torch.zeros(2, 4), torch.zeros(2, 4))
    keys, values, batch = make_case([(5, 5)], 1, 16, 24, torch.float32)
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        FAST.attention(torch.zeros(5, 1, 16), keys, values, batch, AttentionSpec(1.0))
