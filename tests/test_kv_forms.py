"""Policies with sealed forms of their own: their arithmetic, their bytes, and how restored blocks are read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ragged import RaggedDriver
from safetensors.torch import load_file, save_file
from test_sealed import MIXED, make_batch, make_cache
from tiny import make_tiny_model
from torch import Tensor

from headrace.cache.policies.base import KVShape, LayerStep
from headrace.cache.policies.bfp import order_channels
from headrace.cache.policies.choice import make_policy
from headrace.cache.policies.pairs import PairForm
from headrace.cache.policies.records import Record
from headrace.cache.policies.restoring import SCRATCH_BLOCKS, Restorer, read_tokens
from headrace.cache.policies.slerp import Merged, choose_distant, choose_near, merge
from headrace.checkpoint import open_checkpoint
from headrace.core import InputError, SamplingParams
from headrace.kernels import _cpu, choose_kernels
from headrace.kernels.base import AttentionSpec, LayerCache, SealedForm
from headrace.kernels.cpu import CpuKernels
from headrace.kernels.reference import ReferenceKernels
from headrace.kernels.units import unpack_units
from headrace.kernels.vectors import Part, VectorForm, lay_vectors
from headrace.llm import LLM
from headrace.model import Model, ModelSettings, load_model

CHANGES = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 4}
SHARED = "minicache(start=0, keep=0.2, residual=64)"
POLICIES = [
    "bfp(block=16, v=2)",
    "bfp(mantissa=2, sort=False, residual=40)",
    SHARED,
    "minicache(start=1, retention='range', residual=32)",
    "minicache(start=2, keep=0.1, residual=32)+kivi(k=4, v=2)",
]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    # Tests may have chosen another instruction set for the process.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("forms") / "model", **CHANGES)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return open_model(folder)


def open_model(folder: Path) -> Model:
    kernels = choose_kernels("auto", "cpu")
    kernels.set_threads(1)
    return load_model(open_checkpoint(str(folder)), kernels, ModelSettings())


def make_text(length: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 300) for _ in range(length)]


@pytest.mark.parametrize("mantissa", [2, 4, 8])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_block_floats_come_back_within_half_a_step(mantissa: int, group: int) -> None:
    codec = VectorForm(32, 128, mantissa, group, exponents=True, by_channel=group == 32)
    x = torch.randn(3, 32, 128) * 10.0 ** torch.randint(-3, 4, (3, 32, 1))
    x[1, 5] = 0
    numbers = codec.encode(x)
    found, grouped = codec.decode(numbers), x.view(3, 32, -1, group)
    steps = 2.0 ** (grouped.abs().amax(-1, keepdim=True).clamp(min=2.0**-100).log2().floor() - mantissa + 2)
    error = (found.view_as(grouped) - grouped).abs()
    # The largest positive mantissa is one less than the largest negative one.
    clamped = grouped > (2 ** (mantissa - 1) - 0.5) * steps
    assert bool((error <= torch.where(clamped, steps, steps / 2)).all()) and not found[1, 5].any()
    assert codec.nbytes == 32 * (128 * mantissa // 8 + 128 // group)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_by_token_come_back_within_half_a_step(bits: int) -> None:
    codec = VectorForm(16, 96, bits, 32)
    x = torch.randn(3, 16, 96)
    x[0, 3] = 0.25
    found, groups = codec.decode(codec.encode(x)), x.view(3, 16, 3, 32)
    spread = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    assert bool(((found.view_as(groups) - groups).abs() <= spread / (2**bits - 1) / 2 * 1.01 + 4e-3).all())
    assert codec.nbytes == 16 * (96 * bits // 8 + 3 * 3)


FORMS = [
    VectorForm(32, 64, 32),
    VectorForm(32, 64, 16, by_channel=True),
    *(VectorForm(48, 128, bits, 32, by_channel=turned) for bits in (2, 4, 8) for turned in (False, True)),
    *(
        VectorForm(16, 64, bits, 16, exponents=True, by_channel=turned)
        for bits in (2, 4, 8)
        for turned in (False, True)
    ),
]


@pytest.mark.parametrize("form", FORMS)
def test_a_record_is_read_as_it_was_written(form: VectorForm) -> None:
    record = Record((Part(torch.bfloat16, (3,)), *form.parts))
    plane = torch.full((6, record.nbytes + 64), 7, dtype=torch.uint8)
    numbers = [torch.randn(2, 3).bfloat16(), *form.encode(torch.randn(2, form.tokens, form.width))]
    record.write(plane, torch.tensor([4, 1]), numbers)
    assert record.nbytes % 64 == 0 and bool((plane[[0, 2, 3, 5]] == 7).all())
    for place, each in enumerate(numbers):
        assert torch.equal(record.read(plane, torch.tensor([4, 1]), place), each)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
def test_unpacking_gives_the_bits_of_plain_torch(form: VectorForm, dtype: torch.dtype, instruction_set: str) -> None:
    plane = torch.zeros(7, form.nbytes + 64, dtype=torch.uint8)
    vectors = torch.randn(7, form.tokens, form.width) * 10.0 ** torch.randint(-2, 3, (7, form.tokens, 1))
    Record(form.parts).write(plane, torch.arange(7), form.encode(vectors))
    blocks, factors = torch.tensor([5, 0, 6, 5]), torch.rand(4, form.tokens)
    orders = [None, torch.randperm(form.width)] if form.by_channel else [None]
    pair = 4 // dtype.itemsize
    shape = (2, form.width // 2 // pair, form.tokens) if form.by_channel else (2, form.tokens // pair, form.width // 2)
    for order in orders:
        for factor in (None, factors):
            mine, plain = (torch.full((4, *shape, pair), torch.nan, dtype=dtype) for _ in range(2))
            CpuKernels(instruction_set).unpack(form, plane, blocks, mine, factor, order)
            ReferenceKernels().unpack(form, plane, blocks, plain, factor, order)
            assert torch.equal(mine, plain)
            expected = form.decode(form.encode(vectors))[blocks]
            expected = expected if order is None else expected[..., order]
            expected = expected if factor is None else expected * factor[..., None]
            assert torch.equal(plain, lay_vectors(expected, plain, form.by_channel).to(dtype))


def test_what_cannot_be_unpacked_is_refused() -> None:
    form = VectorForm(32, 64, 4, 32, by_channel=True)
    plane, blocks = torch.zeros(4, form.nbytes, dtype=torch.uint8), torch.tensor([3, 1])
    into, factors, order = torch.zeros(2, 2, 32, 32, 1), torch.ones(2, 32), torch.arange(64)
    unpack = CpuKernels().unpack
    unpack(form, plane, blocks, into, factors, order)
    for wrong, said in (
        ((form, plane, blocks[:1], into), "1 blocks"),
        ((form, plane, blocks.int(), into), "blocks of int64"),
        ((form, plane[:, 1:], blocks, into), "bytes of a plane"),
        ((form, plane, blocks, into[:, :1]), "do not unpack into"),
        ((replace(form, group=8), torch.zeros(4, 4096, dtype=torch.uint8), blocks, into), "multiples of 16"),
        ((form, plane, blocks, into, factors[:1]), "factors"),
        ((form, plane, blocks, into, factors.double()), "factors"),
        ((form, plane, blocks, into, None, order.int()), "an order must be"),
        ((replace(form, by_channel=False), plane, blocks, into.view(2, 2, 32, 32, 1), None, order), "an order must be"),
    ):
        with pytest.raises(ValueError, match=said):
            unpack(*wrong)


def restored(merged: Merged, lengths: Tensor) -> Tensor:
    return merged.direction * lengths[..., None]


def test_equal_vectors_come_back_and_lengths_are_exact() -> None:
    x, y = torch.randn(4, 32, 192) * 3, torch.randn(4, 32, 192)
    same = merge(x, x * 2, 0.6)
    assert float((restored(same, same.first) - x).abs().max()) < 1e-5
    assert float((restored(same, same.second) - 2 * x).abs().max()) < 2e-5
    other = merge(x, y, 0.6)
    torch.testing.assert_close(restored(other, other.first).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(restored(other, other.second).norm(dim=-1), y.norm(dim=-1))


def test_the_direction_is_on_the_great_circle() -> None:
    x, y = torch.randn(50, 64), torch.randn(50, 64)
    for share in (0.0, 0.3, 0.6, 1.0):
        merged = merge(x, y, share)
        angle = torch.nn.functional.cosine_similarity(x, y, -1).acos()
        to_first, to_second = (
            torch.nn.functional.cosine_similarity(merged.direction, each, -1).clamp(-1, 1).acos() for each in (x, y)
        )
        torch.testing.assert_close(to_first, share * angle, atol=2e-3, rtol=0)
        torch.testing.assert_close(to_second, (1 - share) * angle, atol=2e-3, rtol=0)
        torch.testing.assert_close(merged.distance, angle / torch.pi, atol=1e-5, rtol=0)


def test_parallel_opposite_and_zero_vectors_are_safe() -> None:
    x = torch.randn(8, 32)
    for y in (x, x + 1e-6, -x, -x + 1e-6, torch.zeros(8, 32)):
        for share in (0.5, 0.6):
            merged = merge(x, y, share)
            assert bool(merged.direction.isfinite().all() and merged.distance.isfinite().all())
            torch.testing.assert_close(merged.direction.norm(dim=-1), torch.ones(8))
    nothing = merge(torch.zeros(2, 32), torch.zeros(2, 32), 0.6)
    assert not nothing.direction.any() and not nothing.first.any()


def test_the_most_distant_tokens_are_kept_or_those_of_the_printed_rule() -> None:
    distances = torch.rand(5, 32)
    for row, chosen in zip(distances, choose_distant(distances, 4), strict=True):
        assert set(chosen.tolist()) == set(sorted(range(32), key=lambda token: -float(row[token]))[:4])
    for row, chosen in zip(distances, choose_near(distances, 4, 0.2), strict=True):
        border = row.min() + (row.max() - row.min()) * 0.2
        expected = sorted((token for token in range(32) if row[token] <= border), key=lambda token: float(row[token]))
        assert set(chosen.tolist()) == set(expected[:4])
    assert choose_near(distances, 0, 0.2).shape == choose_distant(distances, 0).shape == (5, 0)


def join(first: Tensor, second: Tensor, kept: int) -> tuple[Merged, Tensor]:
    merged = merge(first, second, 0.6)
    return merged, choose_distant(merged.distance, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [None, (4, 2)])
def test_a_pair_keeps_lengths_directions_and_the_chosen_tokens(
    bits: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    form = PairForm(32, 64, dtype, 3, bits)
    number = 4 if dtype == torch.float32 else 2
    directions = [64 * number] * 2 if bits is None else [64 * each // 8 + 2 * 3 for each in bits]
    parts = [32 * each + 3 * 2 + 2 * (32 * number + 3 * 64 * dtype.itemsize) for each in directions]
    assert form.nbytes == -(-max(parts) // 64) * 64
    (k1, v1), (k2, v2) = layers = tuple(
        (torch.randn(4, 32, 64).to(dtype).float(), torch.randn(4, 32, 64).to(dtype).float()) for _ in range(2)
    )
    planes = torch.zeros(9, form.nbytes, dtype=torch.uint8), torch.zeros(9, form.nbytes, dtype=torch.uint8)
    cache = make_cache(4, 2, 32, 32, dtype, SealedForm(4, 4))
    blocks = torch.tensor([1, 8, 2, 5]), torch.tensor([3, 2, 0, 7])
    form.write(planes, blocks, layers, lambda first, second: join(first, second, 3))  # type: ignore[arg-type]
    found = []
    for layer in range(2):
        form.unpack(CpuKernels(), planes, blocks, layer, (cache.keys, cache.values))
        found.append(read_tokens(cache, torch.arange(4)))
    for tensor, (first, second) in enumerate(((k1, k2), (v1, v2))):
        merged, chosen = join(first, second, 3)
        rest = torch.ones(4, 32, dtype=torch.bool).scatter(1, chosen, False)
        for own, lengths, mine in ((first, merged.first, found[0][tensor]), (second, merged.second, found[1][tensor])):
            assert torch.equal(mine[~rest], own[~rest])
            torch.testing.assert_close(mine.norm(dim=-1), lengths, atol=1e-3 * 12, rtol=0 if number == 4 else 4e-3)
            tolerance = 1e-5 if number == 4 else 1e-2
            if bits is None:
                torch.testing.assert_close(mine[rest], restored(merged, lengths)[rest], atol=tolerance, rtol=tolerance)
    again = torch.zeros_like(planes[0]), torch.zeros_like(planes[1])
    for index in range(4):
        one = slice(index, index + 1)
        each = tuple((keys[one], values[one]) for keys, values in layers)
        places = blocks[0][one], blocks[1][one]
        form.write(again, places, each, lambda first, second: join(first, second, 3))  # type: ignore[arg-type]
    assert torch.equal(planes[0], again[0]) and torch.equal(planes[1], again[1])


def test_merging_token_by_token_is_merging_together() -> None:
    x, y = torch.randn(64, 192), torch.randn(64, 192)
    together = merge(x, y, 0.6)
    apart = [merge(x[token : token + 1], y[token : token + 1], 0.6) for token in range(64)]
    torch.testing.assert_close(torch.cat([each.direction for each in apart]), together.direction, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([each.distance for each in apart]), together.distance, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_read_and_laid_as_kernels_have_them(dtype: torch.dtype) -> None:
    cache = make_cache(5, 3, 64, 32, dtype, SealedForm(8, 8))
    blocks = torch.tensor([3, 0])
    keys, values = read_tokens(cache, blocks)
    assert torch.equal(keys.view(2, 32, 3, 64)[1, 7, 2, 5], cache.keys[0, 2].float().permute(1, 0, 2).flatten(1)[7, 5])
    assert torch.equal(lay_vectors(keys.to(dtype), cache.keys, True), cache.keys[blocks])
    assert torch.equal(lay_vectors(values.to(dtype), cache.values, False), cache.values[blocks])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [1, 32, 100])
@pytest.mark.parametrize("most", [SCRATCH_BLOCKS, 12])
def test_restored_blocks_are_read_as_a_kernel_reads_sealed_ones(
    dtype: torch.dtype, residual: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.cache.policies.restoring.SCRATCH_BLOCKS", most)
    form, fast, size = SealedForm(8, 4), CpuKernels(), 32
    batch = make_batch(MIXED, size)
    batch = replace(batch, token_ids=torch.zeros(len(batch.positions), dtype=torch.int64))
    cache = make_cache(int(batch.block_tables[0].max()) + 1, 3, 64, size, dtype, form)
    cache = replace(cache, residual=residual)
    assert cache.sealed is not None
    sealed = cache.sealed

    def unpack(blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        found = unpack_units(sealed[blocks].transpose(0, 1), form, 64)
        by_token = [each.view(3, -1, size, 64).permute(1, 2, 0, 3).flatten(2) for each in found]
        keys.copy_(lay_vectors(by_token[0], keys, True))
        values.copy_(lay_vectors(by_token[1], values, False))

    queries, spec = torch.randn(len(batch.positions), 9, 64).to(dtype), AttentionSpec(0.125)
    restorer = Restorer()
    mine = restorer.attend(LayerStep(0, queries, cache, batch, spec, fast), unpack)
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(mine, fast.attention(queries, cache, batch, spec), atol=tolerance, rtol=tolerance)
    # The same step's next layer, whose exact blocks lie beside, and its sealed ones elsewhere.
    places = torch.randperm(len(cache.keys))
    cache = replace(cache, sealed=sealed[places], sealed_group=2)
    table = batch.block_tables[1]
    moved = torch.where(table < 0, table, places.argsort().int()[table.clamp(min=0)])
    batch = replace(batch, block_tables=(*batch.block_tables, moved))
    assert cache.sealed is not None
    sealed = cache.sealed
    first = restorer.attend(LayerStep(0, queries, replace(cache, sealed_group=1), batch, spec, fast), unpack)
    second = restorer.attend(LayerStep(1, queries, cache, batch, spec, fast), unpack)
    assert torch.equal(second, mine) and not torch.equal(first, mine)
    exactly = restorer.attend(LayerStep(0, queries, cache, replace(batch, read_exactly=True), spec, fast), unpack)
    assert torch.equal(exactly, fast.attention(queries, LayerCache(cache.keys, cache.values), batch, spec))


def run_chunks(driver: RaggedDriver, number: int, chunks: list[int]) -> Tensor:
    pieces = []
    for length in chunks:
        pieces.append(driver.run({number: length})[number])
        driver.slide(number)
    return torch.cat(pieces)


@pytest.mark.parametrize("kv", POLICIES)
def test_a_text_has_the_same_bits_in_any_chunks_and_beside_others(model: Model, kv: str) -> None:
    tokens = make_text(161)
    driver = RaggedDriver(model, block_size=32, kv=kv)
    expected = run_chunks(driver, driver.add(tokens), [1] * 161)
    plain = RaggedDriver(model, block_size=32)
    assert not torch.equal(run_chunks(plain, plain.add(tokens), [161]), expected)
    most = driver.cache.layout.most_chunk or 161
    for chunks in ([most] * 6, [31, 32, 1, 30, 2, 29, 32, 4], [7] * 23):
        lengths, left = [], 161
        for length in chunks:
            lengths.append(min(length, left, most))
            left -= lengths[-1]
        lengths = [each for each in lengths + [1] * left if each]
        driver = RaggedDriver(model, block_size=32, kv=kv, seed=1)
        assert torch.equal(run_chunks(driver, driver.add(tokens), lengths), expected)
    driver = RaggedDriver(model, block_size=32, kv=kv, seed=2)
    numbers = [driver.add(tokens), driver.add(make_text(161, 1)), driver.add(tokens)]
    found = []
    for start in range(0, 161, 23):
        logits = driver.run({numbers[0]: 23, numbers[1]: 1 + start % 20, numbers[2]: 23})
        assert torch.equal(logits[numbers[0]], logits[numbers[2]])
        found.append(logits[numbers[0]])
        driver.slide(numbers[0])
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize(
    ("kv", "same"),
    [
        ("minicache(start=4)", "plain"),
        ("minicache(residual=4096)", "plain"),
        ("bfp(residual=4096)", "plain"),
        ("minicache(start=4, residual=32)+kivi(k=4, v=2)", "kivi(k=4, v=2)"),
        ("minicache(start=3, residual=64)+kivi(k=2, v=2)", "kivi(k=2, v=2, residual=64)"),
    ],
)
def test_what_changes_nothing_changes_no_bit(model: Model, kv: str, same: str) -> None:
    tokens = make_text(200)
    found = []
    for policy in (kv, same):
        driver = RaggedDriver(model, block_size=32, kv=policy)
        found.append(run_chunks(driver, driver.add(tokens), [60, 60, 60, 20]))
    assert torch.equal(*found)


@pytest.mark.parametrize("kv", POLICIES)
def test_layers_with_windows_stay_exact(kv: str) -> None:
    shape = KVShape((None, 512, 512, None, None, None), 2, 32, torch.bfloat16)
    policy = make_policy(kv)
    layout = policy.arrange(shape, 32)
    for layer, window in enumerate(shape.windows):
        group = layout.groups[layout.place(layer).group]
        assert group.window == (window or (policy.residual if layout.place_sealed(layer) else None))
        assert window is None or layout.place_sealed(layer) is None
    assert layout.place_sealed(4) is not None
    assert layout.place_sealed(0) is None or "minicache" not in kv or "kivi" in kv


def test_layers_that_share_inputs_and_weights_lose_nothing(folder: Path, tmp_path: Path) -> None:
    """Layers 0 and 2 add nothing to what layers 1 and 3 see, and have their weights."""
    shared = make_tiny_model(tmp_path / "shared", **CHANGES)
    weights = load_file(folder / "model.safetensors")
    for layer in (0, 2):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{name}.weight"].zero_()
        for name in ("self_attn.k_proj", "self_attn.v_proj"):
            own = weights[f"model.layers.{layer}.{name}.weight"]
            weights[f"model.layers.{layer + 1}.{name}.weight"] = own.clone()
    save_file(weights, shared / "model.safetensors", metadata={"format": "pt"})
    model, tokens = open_model(shared), make_text(200)
    logits = []
    for kv in ("plain", "minicache(start=0, keep=0, residual=32)"):
        driver = RaggedDriver(model, block_size=32, kv=kv)
        logits.append(run_chunks(driver, driver.add(tokens), [32] * 6 + [8]))
    torch.testing.assert_close(logits[0], logits[1], atol=2e-3, rtol=0)
    assert not torch.equal(logits[0], logits[1])


def test_norms_of_key_weights_are_the_checkpoints(folder: Path, model: Model) -> None:
    weights = load_file(folder / "model.safetensors")
    rows = [weights[f"model.layers.{layer}.self_attn.k_proj.weight"].norm(dim=1) for layer in range(4)]
    torch.testing.assert_close(model.measure_keys(), torch.stack(rows).view(4, 2, 64), atol=1e-5, rtol=1e-5)


def test_sorted_channels_of_a_few_large_ones_are_told_finer() -> None:
    norms = torch.ones(1, 2, 64)
    large = torch.arange(1, 32, 2)
    norms[0, 1, large] = 30
    order = order_channels(norms)[0]
    assert sorted(order.tolist()) == list(range(128)) and torch.equal(order[64:80], 64 + large)
    keys = torch.randn(10, 32, 128)
    # A rotation mixes a channel with the one half a head on.
    keys[..., 64 + torch.cat([large, (large + 32) % 64])] *= 30
    codec = VectorForm(32, 128, 4, 16, exponents=True)
    small = norms[0].view(2, 2, 32).amax(1, keepdim=True).expand(2, 2, 32).flatten() == 1

    def measure(permuted: Tensor, order: Tensor) -> float:
        found = torch.empty_like(permuted)
        found[..., order] = codec.decode(codec.encode(permuted[..., order]))
        return float((found - permuted)[..., small].square().mean())

    assert measure(keys, torch.arange(128)) > 5 * measure(keys, order)


def test_chunks_of_pairs_are_no_longer_than_the_residual(folder: Path, model: Model) -> None:
    driver = RaggedDriver(model, block_size=32, kv=SHARED)
    assert driver.cache.layout.most_chunk == 64
    with pytest.raises(ValueError, match="65 tokens of a text in one step are more than the residual of 64"):
        driver.run({driver.add(make_text(65)): 65})
    with LLM(str(folder), kv=SHARED, precision="fp32", block_size=32, kv_cache_bytes=8 << 20) as llm:
        prompts = [make_text(300, seed) for seed in range(3)]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))  # type: ignore[arg-type]
        again = llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))  # type: ignore[arg-type]
        assert llm.engine.counters.cached_prompt_tokens >= 3 * 288
    tokens = [each.outputs[0].token_ids for each in outputs]
    assert all(len(each) == 20 for each in tokens) and tokens == [each.outputs[0].token_ids for each in again]


@pytest.mark.parametrize(
    ("kv", "said"),
    [
        ("minicache(t=2)", "t must be a number from 0 to 1"),
        ("minicache(retention='most')", "retention must be one of topk, range"),
        ("bfp(block=48)", "block must be one of 16, 32, 64, 128"),
        ("bfp(sort=1)", "sort must be True or False"),
        ("plain+kivi", "plain keeps everything as it is"),
        ("kivi+minicache", "only kivi can stand after a +"),
        ("bfp+kivi", "both policies would write the same sealed blocks"),
        ("bfp(residual=1)+kivi", "both policies would write the same sealed blocks"),
        ("minicache+kivi(k=4, v=4)+kivi(k=2, v=2)", "what it keeps is rounded already; use kivi once"),
        ("snapkv+kivi+kivi", "both policies would write the same sealed blocks"),
        ("minicache+bfp", "only kivi can stand after a +"),
        ("infllm+kivi(k=4)+kivi(k=4)", "its blocks are rounded already; use kivi once"),
        ("shadowkv+kivi(k=4)", "in the model's own number format"),
        ("minicache+kivi(first=32)", "only where it stands alone"),
        ("tova+(snapkv+kivi)", "only kivi can stand after a +"),
        ("minicache+(minicache+kivi)", "only kivi can stand after a +"),
        ("kivi-minicache", "cannot be read"),
        ("kivi(k=4.0)", "k must be one of 2, 4, 8, got 4.0"),
        ("kivi(k=2, k=8)", "k is given twice"),
        ("kivi(k={[1]: 2})", "k must be a number or a text in quotes"),
    ],
)
def test_a_wrong_form_or_combination_says_why(kv: str, said: str) -> None:
    with pytest.raises(InputError) as failure:
        make_policy(kv)
    assert said in str(failure.value)
