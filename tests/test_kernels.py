"""The C++ kernels against plain torch, on every instruction set of this machine; in float32 a row stands alone."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headrace.core import InputError
from headrace.kernels import _cpu, choose_kernels
from headrace.kernels.base import AttentionSpec, HeadSpec, LayerCache, RaggedBatch
from headrace.kernels.cpu import CpuKernels
from headrace.kernels.matrix import Activation, Matrix
from headrace.kernels.reference import ReferenceKernels, dequantize
from headrace.quant import FORMATS as BY_NAME
from headrace.quant import Quantization
from headrace.quant.int4 import Int4
from headrace.quant.int8 import Int8

PLAIN = ReferenceKernels()
FAST = CpuKernels()
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=_cpu.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = FAST.table
    FAST.table = _cpu.find_table(request.param)
    yield request.param
    FAST.table = before


def assert_close(found: Tensor, expected: Tensor, precision: torch.dtype | None = None) -> None:
    tolerance = TOLERANCE[precision or found.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_an_instruction_set_that_is_not_here_is_refused() -> None:
    with pytest.raises(ValueError, match="no sse9"):
        CpuKernels("sse9")


def test_kernels_made_later_leave_an_instruction_set_as_it_is(instruction_set: str) -> None:
    kernels, x = CpuKernels(instruction_set), torch.randn(9, 200).bfloat16()
    weight = kernels.pack(BY_NAME["bf16"].store(torch.randn(70, 200)))
    expected = kernels.linear(x, weight)
    for other in ("auto", *_cpu.instruction_sets()):
        CpuKernels(other).linear(x, weight)
        assert kernels.instruction_set == instruction_set
        assert torch.equal(kernels.linear(x, weight), expected)


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_an_instruction_set_that_plain_torch_would_ignore_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_kernels("reference", "cpu").instruction_set == "torch"
    if name == "auto":
        monkeypatch.setitem(sys.modules, "headrace.kernels.cpu", None)
    with pytest.raises(InputError, match=r"instruction_set avx2 cannot be used: .*; leave it at auto$"):
        choose_kernels(name, "cpu", "avx2")


def avoid_ties(x: Tensor, group: int) -> Tensor:
    """Take x [T, in] away from the middle between two 8-bit numbers, where instruction sets may round differently."""
    parts = []
    for part in torch.split(x, group, 1):
        step = part.abs().amax(1, keepdim=True) / 127
        near = (part / step).round()
        parts.append((near + 0.6 * (part / step - near)) * step)
    return torch.cat(parts, 1)


SHAPES = [(1, 1, 1), (5, 33, 7), (12, 64, 96), (13, 31, 128), (97, 100, 65), (200, 160, 48)]
FORMATS: list[Quantization] = [BY_NAME["fp32"], BY_NAME["bf16"], Int8(64), Int8(20), Int4(32, 64), Int4(64, 64)]
NAMES = ["fp32", "bf16", "int8 by 64", "int8 by 20", "int4 by 32", "int4 by 64"]


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape: tuple[int, int, int], activation: Activation | None, format: Quantization) -> None:
    rows, out, size = shape
    outputs = out if activation is None else 2 * out
    weight, bias = torch.randn(outputs, size) / size**0.5, torch.randn(outputs)
    x = 2 * torch.randn(rows, size)
    x = avoid_ties(x, format.input_group) if isinstance(format, Int8 | Int4) else x.to(format.dtype)
    for each in (None, bias):
        matrix = replace(format.store(weight), bias=each, activation=activation)
        # The oracle of bfloat16 sums in float32 and rounds once, at the end.
        wide = matrix if matrix.scales is not None else replace(matrix, values=matrix.values.float())
        fast, plain = FAST.pack(matrix), PLAIN.pack(wide)
        assert fast.out_features == plain.out_features == out
        assert_close(FAST.linear(x, fast), PLAIN.linear(x.float(), plain, x.dtype))
        assert_close(FAST.linear(x, fast, torch.float32), PLAIN.linear(x.float(), plain), x.dtype)


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_largest_of_a_product_is_that_of_its_rows(threads: int, format: Quantization) -> None:
    before = _cpu.threads()
    FAST.set_threads(threads)
    for rows, out in itertools.product([1, 13, 70, 200], [1, 31, 33, 300]):
        # Some outputs are equal, and most rows' largest is among them: the first one counts.
        weight = torch.randn(out, 64)
        weight[out // 2 :] = weight[: out - out // 2].clone()
        packed = FAST.pack(replace(format.store(weight), bias=torch.randn(out) if out == 33 else None))
        x = torch.randn(rows, 64).to(format.dtype)
        x[0] = 0
        expected = FAST.linear(x, packed, torch.float32).numpy().argmax(-1)
        assert FAST.find_largest(x, packed).tolist() == expected.tolist()
    FAST.set_threads(before)


def test_integer_weights_take_bfloat16() -> None:
    matrix, x = Int8(64).store(torch.randn(40, 200)), torch.randn(30, 200).bfloat16()
    found = FAST.linear(x, FAST.pack(matrix), torch.float32)
    torch.testing.assert_close(found, PLAIN.linear(x, PLAIN.pack(matrix), torch.float32), atol=0.2, rtol=0.01)


def test_activations_far_from_zero_stay_finite() -> None:
    extreme = torch.tensor([[-200.0, 200.0, 0.0, 1.0, 2.0, 3.0]])
    for activation in ("silu", "gelu_tanh"):
        matrix = Matrix(torch.eye(6), activation=activation)
        assert_close(FAST.linear(extreme, FAST.pack(matrix)), PLAIN.linear(extreme, PLAIN.pack(matrix)))


def test_inputs_are_scaled_before_they_are_rounded() -> None:
    x, scales = torch.randn(30, 100), torch.rand(100) + 0.5
    for matrix in (Int8(20).store(torch.randn(40, 100)), Int4(32, 64).store(torch.randn(40, 100))):
        scaled = replace(matrix, input_scales=scales)
        found = FAST.linear(x, FAST.pack(scaled))
        assert_close(found, FAST.linear(x * scales, FAST.pack(matrix)))
        torch.testing.assert_close(found, PLAIN.linear(x, PLAIN.pack(scaled)), atol=0.2, rtol=0.01)


def test_a_norm_within_a_product_is_that_norm() -> None:
    norm, x = torch.randn(100), torch.randn(30, 100)
    for format in FORMATS:
        weight = format.store(torch.randn(40, 100) / 10)
        rows = x.to(format.dtype)
        for added in (rows, None):
            mine, theirs = rows.clone(), rows.clone()
            found = FAST.norm_linear(added, mine, norm, 1e-5, FAST.pack(weight))
            expected = PLAIN.norm_linear(added, theirs, norm, 1e-5, PLAIN.pack(weight))
            assert torch.equal(mine, theirs)
            torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("group", [32, 64])
def test_4_bit_weights_are_the_nearest_of_16_levels(group: int) -> None:
    weight = torch.randn(7, 150)
    found = dequantize(Int4(group, 128).store(weight))
    for part, near in zip(torch.split(weight, group, 1), torch.split(found, group, 1), strict=True):
        step = (part.amax(1) - part.amin(1)) / 15
        assert ((part - near).abs().amax(1) <= 0.51 * step).all()
    again = Int4(group, 128).store(found.float())
    torch.testing.assert_close(dequantize(again), found, atol=2e-3, rtol=0)


def test_integer_sums_do_not_overflow() -> None:
    matrix = Matrix(torch.full((32, 8192), 127, dtype=torch.int8), torch.ones(32), input_group=8192)
    x = torch.full((3, 8192), 127.0) * torch.tensor([[1.0], [-1.0], [0.0]])
    expected = torch.tensor([[1.0], [-1.0], [0.0]]).expand(3, 32) * 8192 * 127 * 127
    assert torch.equal(FAST.linear(x, FAST.pack(matrix)), expected)


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_a_row_of_a_product_has_the_same_bits_in_any_batch(format: Quantization) -> None:
    x, weight = torch.randn(150, 300).to(format.dtype), FAST.pack(format.store(torch.randn(70, 300)))
    together = FAST.linear(x, weight)
    for rows in (1, 2, 3, 7, 12, 13, 96, 97, 149):
        assert torch.equal(FAST.linear(x[:rows], weight), together[:rows])
        assert torch.equal(FAST.linear(x[-rows:], weight), together[-rows:])
    threads = _cpu.threads()
    for count in (1, 2, 5):
        FAST.set_threads(count)
        assert torch.equal(FAST.linear(x, weight), together)
    FAST.set_threads(threads)


def test_linear_refuses_other_shapes() -> None:
    weight = FAST.pack(Matrix(torch.zeros(4, 8)))
    with pytest.raises(ValueError, match="over 8 features cannot take"):
        FAST.linear(torch.zeros(2, 9), weight)
    with pytest.raises(ValueError, match=r"float32 product .* cannot take torch.bfloat16"):
        FAST.linear(torch.zeros(2, 8).bfloat16(), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 30, 64, 576, 1000])
def test_norms(size: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(90, size).to(dtype), torch.randn(90, size).to(dtype)
    weight = torch.randn(size)
    assert_close(FAST.rms_norm(x, weight, 1e-5), PLAIN.rms_norm(x, weight, 1e-5))
    mine, theirs = residual.clone(), residual.clone()
    assert_close(FAST.add_rms_norm(x, mine, weight, 1e-5), PLAIN.add_rms_norm(x, theirs, weight, 1e-5))
    assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("head", [8, 16, 64, 80, 256])
def test_place_heads(head: int, normed: bool, dtype: torch.dtype) -> None:
    fused = torch.randn(50, 11, head).to(dtype)
    rotation = torch.randn(50, head // 2), torch.randn(50, head // 2)
    spec = HeadSpec(torch.randn(head), torch.randn(head), 1e-5) if normed else HeadSpec()
    slots = torch.tensor(random.Random(0).sample(range(0, 6 * 32, 2), 25)).repeat_interleave(2)
    slots[1::2] += 1
    places = [make_cache(6, 3, head, 32, dtype) for _ in range(2)]
    results = [fused.clone() for _ in range(2)]
    for kernels, cache, result in zip((FAST, PLAIN), places, results, strict=True):
        kernels.place_heads(result, spec, rotation, cache, slots)
    assert_close(results[0][:, :5], results[1][:, :5])
    assert_close(places[0].keys, places[1].keys)
    assert torch.equal(places[0].values, places[1].values)


def test_a_token_not_written_yet_is_not_read_as_what_was_there() -> None:
    cache = make_cache(2, 1, 16, 16, torch.bfloat16)
    cache.values.fill_(torch.nan)
    rotation = torch.ones(3, 8), torch.zeros(3, 8)
    FAST.place_heads(torch.ones(3, 3, 16).bfloat16(), HeadSpec(), rotation, cache, torch.tensor([0, 1, 2]))
    none = torch.zeros(0, dtype=torch.int64)
    starts, contexts, table = (torch.tensor(each).int() for each in ([0, 1], [3], [[0]]))
    batch = RaggedBatch(none, torch.tensor([2]).int(), starts, contexts, (table,), (none,), none)
    queries = torch.ones(1, 1, 16).bfloat16()
    assert torch.equal(FAST.attention(queries, cache, batch, AttentionSpec(1.0)), queries)


def make_cache(blocks: int, kv_heads: int, head: int, size: int, dtype: torch.dtype) -> LayerCache:
    pair = 4 // dtype.itemsize
    keys = torch.zeros(blocks, kv_heads, head // pair, size, pair, dtype=dtype)
    return LayerCache(keys, torch.zeros(blocks, kv_heads, size // pair, head, pair, dtype=dtype))


def make_case(
    lengths: list[tuple[int, int]], kv_heads: int, head: int, size: int, dtype: torch.dtype
) -> tuple[LayerCache, RaggedBatch]:
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
    cache = make_cache(blocks, kv_heads, head, size, dtype)
    for each in (cache.keys, cache.values):
        each.copy_(torch.randn(each.shape))
    return cache, RaggedBatch(none, positions, starts, contexts, (table,), (none,), none)


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
    cache, batch = make_case(MIXED, kv_heads, head, size, dtype)
    queries = torch.randn(len(batch.positions), heads + 2, head).to(dtype)[:, 1 : heads + 1]
    assert_close(FAST.attention(queries, cache, batch, spec), PLAIN.attention(queries, cache, batch, spec))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=["plain", "window 9", "window 40", "soft cap"])
def test_a_query_has_the_same_bits_in_any_chunk_and_batch(spec: AttentionSpec, dtype: torch.dtype) -> None:
    cache, batch = make_case([(100, 100), (45, 45)], 3, 64, 32, dtype)
    queries = torch.randn(145, 9, 64).to(dtype)
    whole = FAST.attention(queries, cache, batch, spec)
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
        alone = FAST.attention(queries[start : start + length], cache, part, spec)
        assert torch.equal(alone, whole[start : start + length])


# Blocks that the sequences begin with, as a tree: 0-9 for most of them, then two branches, then what is each one's own.
def make_shared_case(kv_heads: int, head: int, size: int, dtype: torch.dtype) -> tuple[LayerCache, RaggedBatch]:
    """40 sequences of one token and two of several, shuffled, whose tables share blocks at three depths."""
    source, fresh = random.Random(1), itertools.count(30)
    trunk, branches = list(range(10)), [list(range(10, 20)), list(range(20, 29))]
    tables, positions, lengths = [], [], []
    for number in range(42):
        kind = number % 7
        shared = [] if kind == 0 else trunk[:5] if kind == 1 else trunk + (branches[kind % 2] if kind > 3 else [])
        own = [next(fresh) for _ in range(source.randrange(1, 7))]
        length = 3 if number in (20, 21) else 1
        tables.append(shared + own)
        lengths.append(length)
        # The last block may be nearly empty, or the shared ones not all seen yet.
        positions.append(size * len(tables[-1]) - source.randrange(length, size) if kind != 6 else size * 15 + number)
    order = source.sample(range(42), 42)
    table = torch.full((42, max(map(len, tables))), -1)
    for place, number in enumerate(order):
        table[place, : len(tables[number])] = torch.tensor(tables[number])
    starts = torch.tensor([0, *itertools.accumulate(lengths[number] for number in order)])
    tokens = torch.cat([torch.arange(positions[number], positions[number] + lengths[number]) for number in order])
    contexts = torch.tensor([positions[number] + lengths[number] for number in order])
    cache = make_cache(next(fresh), kv_heads, head, size, dtype)
    none = torch.zeros(0, dtype=torch.int64)
    for part in (cache.keys, cache.values):
        part.normal_()
    return cache, RaggedBatch(none, tokens.int(), starts.int(), contexts.int(), (table.int(),), (none,), none)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=["plain", "window 9", "window 40", "soft cap"])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 32), (4, 4, 16), (16, 1, 48)])
def test_a_shared_prefix_changes_no_bit(
    heads: int, kv_heads: int, size: int, spec: AttentionSpec, dtype: torch.dtype
) -> None:
    cache, batch = make_shared_case(kv_heads, 64, size, dtype)
    queries = torch.randn(len(batch.positions), heads, 64).to(dtype)
    together = FAST.attention(queries, cache, batch, spec)
    assert_close(together, PLAIN.attention(queries, cache, batch, spec))
    none = torch.zeros(0, dtype=torch.int64)
    for place in range(42):
        rows = slice(int(batch.query_starts[place]), int(batch.query_starts[place + 1]))
        alone = RaggedBatch(
            none,
            batch.positions[rows],
            torch.tensor([0, rows.stop - rows.start]).int(),
            batch.context_lengths[place : place + 1],
            (batch.block_tables[0][place : place + 1],),
            (none,),
            none,
        )
        assert torch.equal(FAST.attention(queries[rows], cache, alone, spec), together[rows])


def test_odd_layouts_are_refused() -> None:
    cache, rotation = make_cache(1, 1, 4, 16, torch.float32), (torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="must be contiguous"):
        FAST.place_heads(torch.zeros(2, 4, 3).transpose(1, 2), HeadSpec(), rotation, cache, torch.zeros(2).long())
    cache, batch = make_case([(5, 5)], 1, 16, 24, torch.float32)
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        FAST.attention(torch.zeros(5, 1, 16), cache, batch, AttentionSpec(1.0))
