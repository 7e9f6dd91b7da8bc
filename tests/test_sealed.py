"""Sealed blocks: what sealing writes, and attention over sealed and exact blocks, against plain torch."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headrace.kernels import _cpu
from headrace.kernels.base import LARGEST_HEAD, AttentionSpec, LayerCache, RaggedBatch, SealedForm
from headrace.kernels.contexts import read_blocks, write_slots
from headrace.kernels.cpu import CpuKernels
from headrace.kernels.reference import ReferenceKernels
from headrace.kernels.units import pack_units, unpack_units
from headrace.kernels.vectors import decode_middles, encode_middles, restore_groups, round_groups

PLAIN = ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16]
NONE = torch.zeros(0, dtype=torch.int64)
FORMS = [SealedForm(4, 4), SealedForm(4, 2), SealedForm(2, 2), SealedForm(8, 8), SealedForm(8, 4)]
NAMES = [f"k{form.key_bits}v{form.value_bits}" for form in FORMS]


def make_cache(blocks: int, heads: int, head: int, size: int, dtype: torch.dtype, form: SealedForm) -> LayerCache:
    """A cache full of random numbers, whose blocks are all sealed by plain torch."""
    pair = 4 // dtype.itemsize
    keys = torch.randn(blocks, heads, head // pair, size, pair).to(dtype) * 2
    values = torch.randn(blocks, heads, size // pair, head, pair).to(dtype)
    sealed = torch.zeros(blocks, heads, form.count_head_bytes(head, size), dtype=torch.uint8)
    cache = LayerCache(keys, values, 0, sealed, form, 1, 32)
    everything = torch.arange(blocks, dtype=torch.int32)
    PLAIN.seal(cache, everything, everything)
    return cache


def make_batch(lengths: list[tuple[int, int]], size: int, begins: list[int] | None = None) -> RaggedBatch:
    """Sequences of (context, chunk) with scattered blocks, sealed ones elsewhere than exact ones."""
    counts = [-(-context // size) for context, _ in lengths]
    tables = []
    for seed in range(2):
        order = random.Random(seed).sample(range(sum(counts)), sum(counts))
        table = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
        for row, count in enumerate(counts):
            table[row, :count] = torch.tensor([order.pop() for _ in range(count)])
        tables.append(table)
    starts = torch.tensor([0, *(chunk for _, chunk in lengths)]).cumsum(0).int()
    positions = torch.cat([torch.arange(context - chunk, context) for context, chunk in lengths]).int()
    contexts = torch.tensor([context for context, _ in lengths], dtype=torch.int32)
    begun = None if begins is None else torch.tensor(begins, dtype=torch.int32)
    return RaggedBatch(NONE, positions, starts, contexts, tuple(tables), (NONE,), NONE, begins=begun)


def assert_close(mine: Tensor, theirs: Tensor) -> None:
    # Weights and queries times scales are rounded to bfloat16 where that is the dtype.
    tolerance = 1e-4 if mine.dtype == torch.float32 else 5e-2
    torch.testing.assert_close(mine.float(), theirs.float(), atol=tolerance, rtol=tolerance)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


MIXED = [(1, 1), (70, 1), (33, 33), (64, 20), (100, 37), (300, 1), (257, 129), (17, 2)]


@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_sealing_gives_the_bytes_of_plain_torch(form: SealedForm, dtype: torch.dtype, instruction_set: str) -> None:
    fast = CpuKernels(instruction_set)
    for head, size in ((64, 32), (256, 64), (32, 128)):
        cache = make_cache(5, 3, head, size, dtype, form)
        cache.keys[1].fill_(0.7)
        cache.keys[0] -= 200
        cache.values[0] += 70
        cache.values[3, 0] *= 1e-7
        cache.values[3, 1] *= 1e-9
        cache.values[3, 2] = 4e-41
        cache.keys[3, 0] *= 1e4
        cache.values[2].zero_()
        mine = replace(cache, sealed=torch.full_like(cache.sealed, 7))  # type: ignore[arg-type]
        exact, sealed = torch.tensor([3, 1, 2, 0]).int(), torch.tensor([0, 4, 2, 1]).int()
        for kernels, each in ((PLAIN, cache), (fast, mine)):
            kernels.seal(each, exact, sealed)
        assert torch.equal(mine.sealed[sealed.long()], cache.sealed[sealed.long()])  # type: ignore[index]
        assert bool((mine.sealed[3] == 7).all())  # type: ignore[index]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("away", [0, -3, 20, -1000])
def test_groups_come_back_within_half_a_scale(bits: int, away: int) -> None:
    x = torch.randn(500, 32) + away
    x[0], x[1] = 0, away
    x[2] = 4e-41
    codes, scales, middles = round_groups(x, bits)
    found = restore_groups(codes, scales[:, None], middles[:, None], bits)
    levels, spread = 2**bits - 1, x.amax(-1) - x.amin(-1)
    # The scale itself is rounded to 11 bits, by which the outermost codes may be off.
    assert bool(((found - x).abs().amax(-1) <= scales.float() * (0.5 + levels / 2**12) + 1e-40).all())
    if abs(away) <= 20:  # the spread is four
        assert bool((scales[3:].float() <= spread[3:] / levels * (2 if away > 10 else 1.1)).all())


def test_a_byte_tells_middles_to_a_sixteenth() -> None:
    everything = decode_middles(torch.arange(256).to(torch.uint8))
    assert (everything[:3].tolist(), everything[127], everything[255]) == ([0, 1, 2], 3952, -3952)
    assert torch.equal(encode_middles(everything[:128]), torch.arange(128).to(torch.uint8))
    x = torch.linspace(-3952, 3952, 100_001)
    assert bool(((decode_middles(encode_middles(x)) - x).abs() <= (x.abs() + 16) / 32 + 1e-3).all())


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_what_was_sealed_comes_back_within_half_a_step(form: SealedForm) -> None:
    keys, values = torch.randn(2, 96, 64) * 4, torch.randn(2, 96, 64)
    units = pack_units(keys, values, form)
    assert units.shape == (2, 3, form.count_head_bytes(64, 32)) and units.dtype == torch.uint8
    found = unpack_units(units, form, 64)
    by_channel = (keys - found[0]).abs().view(2, 3, 32, 64)
    spread = keys.view(2, 3, 32, 64).amax(2) - keys.view(2, 3, 32, 64).amin(2)
    assert bool((by_channel.amax(2) <= spread / (2**form.key_bits - 1) / 2 * 1.01 + 4e-3).all())
    by_token = (values - found[1]).abs().view(2, 96, 2, 32)
    spread = values.view(2, 96, 2, 32).amax(3) - values.view(2, 96, 2, 32).amin(3)
    assert bool((by_token.amax(3) <= spread / (2**form.value_bits - 1) / 2 * 1.01 + 4e-3).all())


@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("first", [0, 1, 6])
def test_attention_over_sealed_blocks(form: SealedForm, dtype: torch.dtype, instruction_set: str, first: int) -> None:
    fast = CpuKernels(instruction_set)
    for (heads, kv_heads, head, size), residual in (((9, 3, 64, 32), 32), ((4, 1, 256, 64), 100), ((2, 2, 32, 32), 1)):
        batch = make_batch(MIXED, size)
        cache = make_cache(int(batch.block_tables[0].max()) + 1, kv_heads, head, size, dtype, form)
        cache = replace(cache, residual=residual, first=first * size)
        queries = torch.randn(len(batch.positions), heads, head).to(dtype)
        spec = AttentionSpec(head**-0.5)
        assert_close(fast.attention(queries, cache, batch, spec), PLAIN.attention(queries, cache, batch, spec))
        everything = replace(batch, read_exactly=True)
        plain = LayerCache(cache.keys, cache.values)
        assert torch.equal(
            fast.attention(queries, cache, everything, spec), fast.attention(queries, plain, batch, spec)
        )


@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_scores_of_sealed_tokens_have_their_bias(form: SealedForm, dtype: torch.dtype, instruction_set: str) -> None:
    fast, batch, spec = CpuKernels(instruction_set), make_batch(MIXED, 32), AttentionSpec(0.125)
    cache = make_cache(int(batch.block_tables[0].max()) + 1, 3, 64, 32, dtype, form)
    assert cache.sealed is not None
    used = cache.sealed[0].numel()
    whole = torch.cat([cache.sealed.flatten(1), torch.zeros(len(cache.sealed), 4 * 3 * 32, dtype=torch.uint8)], 1)
    bias = whole[:, used:].view(torch.float32).view(-1, 3, 32)
    bias.copy_(torch.rand(bias.shape) * 2)
    cache = replace(cache, sealed=whole[:, :used].view(-1, 3, used // 3))
    queries = torch.randn(len(batch.positions), 9, 64).to(dtype)
    without = fast.attention(queries, cache, batch, spec)
    cache = replace(cache, sealed_bias=bias)
    found = fast.attention(queries, cache, batch, spec)
    assert_close(found, PLAIN.attention(queries, cache, batch, spec))
    # A query without sealed tokens hears nothing of it.
    assert torch.equal(found[0], without[0]) and not torch.equal(found, without)
    bias.zero_()
    assert torch.equal(fast.attention(queries, cache, batch, spec), without)


@pytest.mark.parametrize("sealed", [False, True])
def test_what_lies_before_the_beginning_is_not_read(sealed: bool) -> None:
    lengths, begins = [(200, 1), (300, 40), (64, 64), (150, 1)], [96, 64, 0, 128]
    batch = make_batch(lengths, 32, begins)
    cache = make_cache(int(batch.block_tables[0].max()) + 1, 3, 64, 32, torch.float32, SealedForm(4, 4))
    cache = cache if sealed else LayerCache(cache.keys, cache.values)
    queries = torch.randn(len(batch.positions), 9, 64)
    expected = PLAIN.attention(queries, cache, batch, AttentionSpec(0.125))
    for row, begin in enumerate(begins):
        for table in batch.block_tables:
            table[row, : begin // 32] = -1
    assert_close(CpuKernels().attention(queries, cache, batch, AttentionSpec(0.125)), expected)


@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
def test_small_weights_beside_a_large_one_do_not_pull_values_to_their_least_code(instruction_set: str) -> None:
    """One token has 0.955 of the attention and 31 of its unit 0.0014 each, less than 8 bits tell beside it. Without
    what they weigh counted at the middle code, half of the outputs would be wrong by 0.089."""
    keys, values = torch.zeros(65, 64), torch.ones(65, 64)
    keys[0, 0], keys[32:, 0] = 6.5, -20
    values[:, ::2] = -1
    values[0] = torch.tensor([1, 1, -1, -1]).repeat(16)
    mine, plain = attend_beside_plain(keys, values, instruction_set)
    torch.testing.assert_close(mine, plain, atol=0.06, rtol=0)


@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
def test_a_unit_of_next_to_no_weight_adds_nothing(instruction_set: str) -> None:
    """All of its tokens score 100 less than one before: their weights are the least numbers that the softmax gives."""
    keys, values = torch.zeros(97, 64), torch.randn(97, 64)
    keys[0, 0] = 100
    mine, plain = attend_beside_plain(keys, values, instruction_set)
    torch.testing.assert_close(mine, plain, atol=0.02, rtol=0.02)


def attend_beside_plain(keys: Tensor, values: Tensor, instruction_set: str) -> tuple[Tensor, Tensor]:
    """What a query that scores the first channel of keys [n, 64] reads of a sequence at 4 bits, and by plain torch."""
    batch = make_batch([(len(keys), 1)], 32)
    cache = make_cache(batch.block_tables[0].shape[1], 1, 64, 32, torch.bfloat16, SealedForm(4, 4))
    write_slots(cache, batch.block_tables[0][0].long(), 0, keys[None], values[None])
    PLAIN.seal(cache, batch.block_tables[0][0], batch.block_tables[1][0])
    query = torch.zeros(1, 1, 64).bfloat16()
    query[0, 0, 0] = 8
    spec = AttentionSpec(0.125)
    found = [each.attention(query, cache, batch, spec).float() for each in (CpuKernels(instruction_set), PLAIN)]
    return found[0], found[1]


@pytest.mark.parametrize("instruction_set", [each for each in _cpu.instruction_sets() if each != "avx512_bf16"])
@pytest.mark.parametrize("head", [64, 512])
def test_rows_for_codes_of_8_bits_are_rounded_to_16(head: int, instruction_set: str) -> None:
    batch = make_batch(MIXED, 32)
    cache = make_cache(int(batch.block_tables[0].max()) + 1, 3, head, 32, torch.bfloat16, SealedForm(8, 8))
    queries, spec = torch.randn(len(batch.positions), 9, head).bfloat16(), AttentionSpec(head**-0.5)
    mine = CpuKernels(instruction_set).attention(queries, cache, batch, spec).float()
    # Rounded to 8 bits they differ by ten times as much. What is left is mostly that outputs are rounded to bfloat16.
    assert float((mine - PLAIN.attention(queries, cache, batch, spec).float()).abs().mean()) < 5e-4


@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
def test_products_of_the_largest_head_fit_32_bits(instruction_set: str) -> None:
    batch = make_batch([(64, 1)], 32)
    cache = make_cache(int(batch.block_tables[0].max()) + 1, 1, LARGEST_HEAD, 32, torch.bfloat16, SealedForm(8, 8))
    # All codes are the largest but for one token's.
    keys, values = torch.ones(1, 64, LARGEST_HEAD).bfloat16(), torch.randn(1, 64, LARGEST_HEAD).bfloat16()
    keys[0, 5] = -1
    write_slots(cache, batch.block_tables[0][0].long(), 0, keys, values)
    PLAIN.seal(cache, batch.block_tables[0][0], batch.block_tables[1][0])
    query, spec = torch.ones(1, 1, LARGEST_HEAD).bfloat16(), AttentionSpec(LARGEST_HEAD**-0.5)
    mine = CpuKernels(instruction_set).attention(query, cache, batch, spec)
    assert_close(mine, PLAIN.attention(query, cache, batch, spec))


@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "form"), [(0, SealedForm(4, 2)), (32, SealedForm(8, 8)), (160, SealedForm(2, 4))])
def test_a_query_has_the_same_bits_in_any_chunk_and_beside_others(
    dtype: torch.dtype, first: int, form: SealedForm, instruction_set: str
) -> None:
    fast, size = CpuKernels(instruction_set), 32
    batch = make_batch([(333, 333), (45, 45)], size)
    cache = make_cache(int(batch.block_tables[0].max()) + 1, 3, 64, size, dtype, form)
    cache = replace(cache, first=first)
    queries = torch.randn(378, 9, 64).to(dtype)
    whole = fast.attention(queries, cache, batch, AttentionSpec(0.125))
    for start, length in [(place, 1) for place in range(0, 333, 7)] + [(0, 50), (50, 283), (3, 31), (63, 130)]:
        part = RaggedBatch(
            NONE,
            torch.arange(start, start + length).int(),
            torch.tensor([0, length]).int(),
            torch.tensor([start + length]).int(),
            tuple(table[:1] for table in batch.block_tables),
            (NONE,),
            NONE,
        )
        alone = fast.attention(queries[start : start + length], cache, part, AttentionSpec(0.125))
        assert torch.equal(alone, whole[start : start + length])


@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "form"), [(0, SealedForm(4, 4)), (32, SealedForm(8, 8)), (160, SealedForm(4, 2))])
def test_a_shared_prefix_of_sealed_blocks_changes_no_bit(
    dtype: torch.dtype, first: int, form: SealedForm, instruction_set: str
) -> None:
    fast, count = CpuKernels(instruction_set), 21
    lengths = [(300 + 37 * (number % 5), 1) for number in range(count)]
    batch = make_batch(lengths, 32)
    for row in range(count):
        batch.block_tables[1][row, : 4 + row % 4] = torch.arange(4 + row % 4).int()
        # Some have the exact blocks of the first tokens in common too, some have equal ones of their own.
        if row % 3:
            batch.block_tables[0][row, :5] = torch.arange(5).int()
    cache = make_cache(int(batch.block_tables[0].max()) + 1, 3, 64, 32, dtype, form)
    cache = replace(cache, first=first)
    queries = torch.randn(count, 9, 64).to(dtype)
    together = fast.attention(queries, cache, batch, AttentionSpec(0.125))
    for row in range(count):
        alone = RaggedBatch(
            NONE,
            batch.positions[row : row + 1],
            torch.tensor([0, 1]).int(),
            batch.context_lengths[row : row + 1],
            tuple(table[row : row + 1].contiguous() for table in batch.block_tables),
            (NONE,),
            NONE,
        )
        assert torch.equal(fast.attention(queries[row : row + 1], cache, alone, AttentionSpec(0.125))[0], together[row])


def test_blocks_are_read_as_they_were_written() -> None:
    cache = make_cache(2, 1, 32, 32, torch.float32, SealedForm(8, 8))
    keys, _ = read_blocks(cache, torch.tensor([1]))
    assert torch.equal(keys[0, 3], cache.keys[1, 0, :, 3, 0])
