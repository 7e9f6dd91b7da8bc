"""ShadowKV: keys of a low rank, chunks by their landmarks, values in a file or in memory; what all that takes, where it
lies, how long it is kept."""

from __future__ import annotations

import random
import re
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared_data
from jobs import batch_row, read_journal, read_lines, write_lines
from test_engine import make_prompts, open_model
from test_kv_selection import NONE, attend_plainly, make_cache
from tiny import make_tiny_model
from torch import Tensor

from headrace import SamplingParams
from headrace.cache.paged import PagedCache
from headrace.cache.policies.base import KVShape, LayerStep, Remembering
from headrace.cache.policies.choice import make_policy
from headrace.cache.policies.selecting import NoRoom, find_folder, lies_in_memory, map_file
from headrace.cache.policies.shadowkv import ShadowKV, find_outliers, reduce_rank
from headrace.checkpoint import open_checkpoint
from headrace.cli.entry import main
from headrace.core import Chunk, InputError, Request, Sequence
from headrace.engine.batch import build_batch
from headrace.judge.kv_room import Room, count_batch, find_room
from headrace.kernels import choose_kernels
from headrace.kernels.base import AttentionSpec, LayerCache, RaggedBatch
from headrace.kernels.contexts import read_blocks, write_slots
from headrace.kernels.cpu import CpuKernels
from headrace.kernels.reference import rotate
from headrace.kernels.shadows import CHUNK, BlockRows, choose_chunks
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


def rebuild_keys(keys: Tensor, rope: tuple[Tensor, Tensor], rank: int) -> Tensor:
    """Keys of so low a rank, rotated again."""
    coordinates, directions = reduce_rank(keys, rope, rank)
    assert coordinates.shape == (keys.shape[1], min(rank, HEADS * HEAD))
    return rotate_all(coordinates @ directions, rope)


@pytest.mark.parametrize("stretch", [1.0, 1.3])
def test_keys_of_full_rank_come_back(stretch: float) -> None:
    rope = make_rope(400, stretch)
    keys = rotate_all(torch.randn(HEADS, 320, HEAD), rope)
    torch.testing.assert_close(rebuild_keys(keys, rope, 1000), keys, atol=1e-4, rtol=1e-4)


def test_a_lower_rank_is_as_good_as_it_can_be() -> None:
    rope = make_rope(400)
    straight = torch.randn(HEADS, 320, 8) @ torch.randn(HEADS, 8, HEAD) + 0.1 * torch.randn(HEADS, 320, HEAD)
    singular = torch.linalg.svdvals(straight.transpose(0, 1).flatten(1))
    for rank in (4, 24, 100):
        keys = rotate_all(straight, rope)
        missed = (rebuild_keys(keys, rope, rank) - keys).square().sum().sqrt()
        assert float(missed) == pytest.approx(float(singular[rank:].square().sum().sqrt()), rel=1e-3)


def test_outliers_are_the_chunks_least_like_their_landmark() -> None:
    chunks = torch.randn(HEADS, 20, CHUNK, HEAD) + 3
    chunks[1, 13, 4] *= -1
    outliers = find_outliers(chunks, chunks.mean(2), 3)
    for head in range(HEADS):
        likeness = [
            min(float(torch.cosine_similarity(key, chunk.mean(0), 0)) for key in chunk) for chunk in chunks[head]
        ]
        least = sorted(range(20), key=lambda place: likeness[place])[:3]
        assert outliers[head].tolist() == sorted(least)
    assert 13 in outliers[1].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_are_chosen_by_the_query_that_wants_them_most(dtype: torch.dtype) -> None:
    landmarks, queries = torch.randn(HEADS, 20, HEAD).to(dtype), torch.randn(9, HEAD) * 3
    found = choose_chunks(queries, landmarks, 4, SPEC.scale)
    for head in range(HEADS):
        weights = [(landmarks[head].float() @ queries[3 * head + each] * SPEC.scale).softmax(0) for each in range(3)]
        most = torch.stack(weights).amax(0)
        assert found[head].tolist() == sorted(most.topk(4).indices.tolist())
    assert choose_chunks(queries, landmarks, 20, SPEC.scale).tolist() == [list(range(20))] * HEADS
    # A chunk that stays exact is marked, and never chosen: not even by queries that want nothing else.
    landmarks[:, 3, 0] = torch.finfo(dtype).max
    rest = [place for place in range(20) if place != 3]
    assert choose_chunks(queries * 1000, landmarks, 19, SPEC.scale).tolist() == [rest] * HEADS


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
        numbers=(5,),
    )


def run_layer(policy: ShadowKV, cache: LayerCache, batch: RaggedBatch, queries: Tensor) -> Tensor:
    step = LayerStep(0, queries, cache, batch, SPEC, CpuKernels(), rope=make_rope(4000))
    return policy.attend(step)


PROMPT = 600


@pytest.mark.parametrize("slow", ["file", "memory"])
def test_an_output_reads_outliers_what_it_chose_and_all_that_is_newer(slow: Any) -> None:
    """Of 600 tokens stay: blocks of what stands for it, what an output chooses, an outlier chunk, the newest
    tokens. Keys are of that low rank already."""
    policy = ShadowKV(rank=32, budget=60, outliers=1, local=20, slow=slow)
    drop = count_dropped(policy, PROMPT)
    blocks = policy._summary.count_blocks(PROMPT)
    cache, table = make_cache(22, HEADS, SIZE, torch.float32), torch.randperm(22).int()[None]
    keys, values = give_rank(cache, table[0].long(), 32)
    # 64 chosen tokens, 8 of an outlier; those after them are as they were.
    begin, shadowed = drop * SIZE, (drop + blocks) * SIZE + 64 + 8
    assert (drop, blocks) == {"file": (11, 4), "memory": (2, 13)}[slow] and PROMPT - shadowed >= 20
    batch = make_batch(PROMPT, PROMPT, table, shrinks=drop)
    queries = torch.randn(PROMPT, 9, HEAD)
    plain = CpuKernels().attention(queries, cache, batch, SPEC)
    assert torch.equal(run_layer(policy, cache, batch, queries), plain)
    cut = keys[:, :shadowed].reshape(HEADS, -1, CHUNK, HEAD)
    outliers = find_outliers(cut, cut.mean(2), 1)
    marked = cut.mean(2)
    marked[torch.arange(HEADS)[:, None], outliers, 0] = torch.finfo(torch.float32).max
    queries = torch.randn(4, 9, HEAD)
    one_by_one = [
        run_layer(policy, cache, make_batch(PROMPT + 1 + step, 1, table, begin), queries[step : step + 1])
        for step in range(4)
    ]
    together = run_layer(policy, cache, make_batch(PROMPT + 4, 4, table, begin), queries)
    assert torch.equal(torch.cat(one_by_one), together)
    for step in range(4):
        chosen = torch.cat([outliers, choose_chunks(queries[step], marked, 8, SPEC.scale)], 1)
        for head in range(9):
            places = (chosen[head // 3][:, None] * CHUNK + torch.arange(CHUNK)).flatten()
            seen = torch.cat([places, torch.arange(shadowed, PROMPT + 1 + step)])
            expected = attend_plainly(queries[step, head], keys[head // 3, seen], values[head // 3, seen])
            torch.testing.assert_close(together[step, head], expected, atol=1e-4, rtol=1e-4)


def give_rank(cache: LayerCache, blocks: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Make the blocks' keys ones that are of this rank before rotation; keys and values [kv heads, N, D]."""
    count = len(blocks) * SIZE
    straight = (torch.randn(count, rank) @ torch.randn(rank, HEADS * HEAD) / rank**0.5).view(count, HEADS, HEAD)
    _, values = read_blocks(cache, blocks)
    write_slots(cache, blocks, 0, rotate_all(straight.transpose(0, 1), make_rope(count)), values)
    keys, values = read_blocks(cache, blocks)
    return keys.clone(), values.clone()


def make_shape(dtype: torch.dtype = torch.float32) -> KVShape:
    return KVShape((None,), HEADS, HEAD, dtype)


def count_dropped(policy: ShadowKV, prompt: int, dtype: torch.dtype = torch.float32) -> int:
    """Blocks that a prompt loses at its end."""
    shrink = policy.arrange(make_shape(dtype), SIZE).shrink
    assert shrink is not None
    return shrink.count_dropped(prompt, SIZE)


@pytest.mark.parametrize("slow", ["file", "memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_as_computed_by_hand(dtype: torch.dtype, slow: Any, tmp_path: Path) -> None:
    """What is planned is no less than what is kept, and of a long prompt little more."""
    folder = {"folder": str(tmp_path)} if slow == "file" else {}
    policy = ShadowKV(rank=50, budget=64, outliers=2, local=16, slow=slow, **folder)
    prompt = 3000
    drop = count_dropped(policy, prompt, dtype)
    planned = policy._summary.count_blocks(prompt)
    cache, table = make_cache(94, HEADS, SIZE, dtype), torch.randperm(94).int()[None]
    queries = torch.randn(prompt, 9, HEAD).to(dtype)
    run_layer(policy, cache, make_batch(prompt, prompt, table, shrinks=drop), queries)
    shadow, item = policy._shadows[5], dtype.itemsize
    tokens = shadow.chunks * CHUNK
    assert tokens == (drop + planned) * SIZE + 64 + 16 and prompt - SIZE < tokens + 16 <= prompt
    # What was written, up to the last row that is not zero. 8 * 50 coordinates of a chunk are in 7 rows of 64.
    written = BlockRows.view(cache.keys, cache.values, table[0, drop : drop + planned]).read(
        0, planned * 2 * SIZE * HEADS
    )
    real = (int(written.any(1).nonzero().max()) + 1) * HEAD * item
    values = tokens * HEADS * HEAD * item
    # 8 chosen chunks of each head: their places are in one row.
    expected = (1 + shadow.chunks * (HEADS + 7) + HEADS * 50) * HEAD * item
    if shadow.values is not None:
        assert slow == "file" and policy.count_bytes() == shadow.values.nbytes == values and real == expected
    else:
        assert slow == "memory" and policy.count_bytes() == 0 and real == expected + values
    assert real <= planned * SIZE * HEADS * HEAD * 2 * item <= 1.1 * real
    assert list(tmp_path.iterdir()) == []
    policy.release(5)
    policy.release(6)
    assert policy.count_bytes() == 0 and not policy._shadows


def test_a_prompt_whose_shadow_would_save_nothing_stays_whole() -> None:
    long = {kv: find_shortest(kv) for kv in ("shadowkv", "shadowkv(rank=48)", "shadowkv(slow='memory')")}
    assert long == {"shadowkv": 408, "shadowkv(rank=48)": 312, "shadowkv(slow='memory')": 1432}
    with pytest.raises(InputError, match="keys of rank 192 and values in memory take no less"):
        make_policy("shadowkv(rank=192, slow='memory')").arrange(make_shape(), SIZE)


def find_shortest(kv: str) -> int:
    """The least tokens of a prompt that is made smaller."""
    shrink = make_policy(kv).arrange(make_shape(torch.bfloat16), SIZE).shrink
    assert shrink is not None
    return next(length for length in range(10_000) if shrink.count_dropped(length, SIZE))


def find_tensors(thing: object) -> Iterator[Tensor]:
    """All tensors that can be reached from a policy."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for each in thing.values() if isinstance(thing, dict) else thing:
            yield from find_tensors(each)
    elif is_dataclass(thing):
        yield from find_tensors([getattr(thing, each.name) for each in fields(thing)])


def find_file(tensor: Tensor) -> str:
    """The file that a tensor's memory is mapped from, "" for none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if begin <= tensor.data_ptr() < end:
            return name if "/" in name else ""
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are read from /proc/self/maps")
@pytest.mark.parametrize("slow", ["file", "memory"])
def test_a_run_keeps_to_its_kv_budget(slow: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """At every step the arena and whatever else the policy has in memory are within it; the rest is in files."""
    model = make_tiny_model(tmp_path_factory.mktemp("shadow") / "model", head_dim=32)
    budget, source = 1_500_000, random.Random(0)
    prompts = [[source.randrange(3, 300) for _ in range(length)] for length in range(300, 700, 40)]
    kv = f"shadowkv(rank=16, budget=32, outliers=1, local=8, slow='{slow}')"
    with open_model(model, kv=kv, kv_cache_bytes=budget, block_size=32) as llm:
        engine, policy, most, shadows = llm.engine, llm.engine.cache.policy, 0, 0
        assert isinstance(policy, ShadowKV)
        for number, prompt in enumerate(prompts):
            engine.add(Request(str(number), tuple(prompt), SamplingParams(max_tokens=40, ignore_eos=True)))
        while engine.unfinished:
            engine.step()
            sizes = {True: 0, False: 0}
            for tensor in find_tensors(vars(policy)):
                sizes["headrace-" in find_file(tensor)] += tensor.nbytes
            assert engine.cache.arena.nbytes + sizes[False] <= budget
            assert policy.count_bytes() == sizes[True]
            assert (policy.count_bytes() > 0) == (slow == "file" and bool(policy._shadows))
            most, shadows = max(most, engine.counters.kv_used_bytes), max(shadows, len(policy._shadows))
        assert 0.8 * budget < most <= budget and shadows > 1


def test_the_judge_and_forecasts_count_what_stands_for_a_prompt() -> None:
    """SmolLM2 in bfloat16: 240 bytes of a token and 37,120 of a sequence in each layer beside what is read."""
    shape = KVShape((None,) * 30, 3, 64, torch.bfloat16)
    layout = make_policy("shadowkv").arrange(shape, 32)
    block = 30 * 32 * 768
    assert layout.shrink is not None and layout.shrink.summary == (240, 36_864 + 256, 32 * 768)
    # 1,024 tokens: 12 blocks of that, 4 that are chosen, and 56 tokens of outliers and newest ones.
    beside = -(-(1024 * 240 + 37_120) // (32 * 768))
    assert beside == 12 and find_room(layout, 1024, 128, 256) == Room(32, beside + 4 + 2 + 4)
    assert count_batch(layout, 1024, 128, 256, 500 * 10**6) == 1 + (500 * 10**6 // block - 32) // 22
    assert layout.blocks_for(1024, prompt=1024) == 32


def test_values_in_a_file_come_back_and_no_room_says_so(tmp_path: Path) -> None:
    numbers = map_file(str(tmp_path), 1000, torch.bfloat16)
    numbers.copy_(torch.arange(1000))
    assert torch.equal(numbers, torch.arange(1000).bfloat16())
    with pytest.raises(NoRoom, match=r"4,000 bytes of a prompt's values cannot be kept in .*missing: No such file"):
        map_file(str(tmp_path / "missing"), 1000, torch.float32)
    with pytest.raises(NoRoom, match=r"Make room there; a job goes on .* when the same command is run again"):
        map_file(str(tmp_path), 1 << 58, torch.float32)


@pytest.mark.parametrize(
    ("kv", "said"),
    [
        ("shadowkv(folder='/missing')", "is no folder"),
        ("shadowkv(rank=0)", "rank must be a whole number from 1"),
        ("shadowkv(folder=3)", "folder must be a text in quotes, got 3"),
        ("shadowkv(slow='disk')", "slow must be one of file, memory"),
        ("shadowkv(slow='memory', folder='/tmp')", "folder is for values in files"),
    ],
)
def test_what_cannot_be_is_refused(kv: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_policy(kv)


@pytest.mark.skipif(not lies_in_memory("/dev/shm"), reason="/dev/shm is no memory here")
def test_files_that_are_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="files in /dev/shm are memory themselves"):
        make_policy("shadowkv(folder='/dev/shm')")
    make_policy("shadowkv(slow='memory')")
    # Where the system's temporary folder is memory, another one on a disk serves.
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    assert find_folder("") == "/var/tmp"


@contextmanager
def limit_files(size: int) -> Iterator[None]:
    """No file can grow beyond this, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_a_job_that_goes_on_later(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"num_hidden_layers": 16, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048}
    model = make_tiny_model(tmp_path_factory.mktemp("shadow") / "model", **changes)
    rows = [batch_row(f"row-{place}", "What does it grind? " * length) for place, length in enumerate((1, 2, 90))]
    source, output = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    command = [
        "run",
        str(source),
        "-o",
        str(output),
        "--model",
        str(model),
        "--kv",
        "shadowkv(rank=8, budget=32)",
        "--kv-cache-bytes",
        "128MiB",
    ]
    command += ["--precision", "fp32", "--max-tokens", "3", "--max-sequences", "1", "--schedule", "fcfs", "--quiet"]
    with limit_files(12 << 20):
        assert main(command) == 3
    said = capsys.readouterr().err
    assert re.search(r"bytes of a prompt's values cannot be kept in /.*: File too large\. Make room there", said)
    assert len(read_journal(output)) == 2 and not output.exists()
    assert main(command) == 0
    assert len(read_lines(output)) == 3


def test_what_is_kept_of_a_sequence_ends_with_it(tiny_model: Path) -> None:
    kv = "shadowkv(rank=8, budget=16, outliers=1, local=8)"
    prompts = make_prompts(8)
    with open_model(tiny_model, kv=kv) as llm:
        policy = llm.engine.cache.policy
        assert isinstance(policy, ShadowKV) and isinstance(policy, Remembering)
        for number, prompt in enumerate(prompts):
            llm.engine.add(Request(str(number), tuple(prompt), SamplingParams(max_tokens=30, ignore_eos=True)))
        shrink = llm.engine.cache.layout.shrink
        assert shrink is not None
        long = [number for number, prompt in enumerate(prompts) if shrink.count_dropped(len(prompt), 16)]
        assert len(long) > 1
        while len(policy._shadows) < len(long):
            llm.engine.step()
        held = policy.count_bytes()
        llm.engine.abort(str(long[0]))
        assert len(policy._shadows) == len(long) - 1 and 0 < policy.count_bytes() < held
        while llm.engine.unfinished:
            llm.engine.step()
        assert policy.count_bytes() == 0


def test_outliers_of_the_real_model_have_the_first_chunk(smollm2_path: Path) -> None:
    """Attention rests on the first token of a text: its key is unlike its neighbours' in most heads."""
    text = shared_data("wikitext2_test.txt").read_text()[:3000]
    checkpoint = open_checkpoint(str(smollm2_path))
    model = load_model(checkpoint, choose_kernels("auto", "cpu"), ModelSettings(precision="fp32", max_context=512))
    tokens = checkpoint.tokenizer().encode(text)[:512]
    policy, table = ShadowKV(), torch.arange(16)
    cache = PagedCache(model.kv_shape, policy, 32, 16, "cpu")
    sequence = Sequence(Request("0", tuple(tokens), SamplingParams()), 0, 0, tokens, tables=[table.tolist()])
    model.forward(build_batch([(Chunk(0, 0, 512), sequence)], cache.layout, "cpu"), cache)
    views = [policy._view(layer, table, policy._shadows[0], place) for place, layer in enumerate(cache.layers)]
    landmarks = [each.read_landmarks() for each in views]
    first = torch.stack([each[:, 0, 0] == torch.finfo(each.dtype).max for each in landmarks])
    assert len(first) == 30 and float(first.float().mean()) > 0.5
