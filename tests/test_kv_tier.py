"""Prefixes that come back from disk: less is computed, and every answer is the same, bit for bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import batch_rows, engine_options, run, without_times, write_lines
from page_cache import drop_from_memory, list_in_memory
from tiny import make_tiny_model

from headrace import LLM, RequestOutput, SamplingParams
from headrace.cache import tier
from headrace.cache.checks import check_ledger
from headrace.cache.layout import CacheLayout
from headrace.cache.ledger import KVLedger
from headrace.cache.policies.choice import POLICIES
from headrace.cache.store import BlockStore
from headrace.core import Admission, Chunk, InputError, Request, Sequence, StepPlan
from headrace.engine.loading import change_kv
from headrace.job.run import run_job
from headrace.meter.report import format_report
from headrace.options import EngineOptions, RunOptions, SamplingOptions
from headrace.schedule.apply import apply
from headrace.schedule.state import SchedulerState
from headrace.schedule.step import plan_step

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=3)
KIVI = "kivi(k=4, v=2, residual=40)"
# Not a multiple of the block size: the first two blocks stay exact.
FIRST = "kivi(k=4, v=4, first=40)"


def open_model(folder: Path, kv_dir: Path | None, **options: Any) -> LLM:
    settings = {"precision": "fp32", "block_size": 32, "kv_cache_bytes": 8 << 20, "threads": 1} | options
    return LLM(str(folder), kv_dir=None if kv_dir is None else str(kv_dir), **settings)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layers that see all tokens, layers that do not, and a head size that can be sealed."""
    folder = tmp_path_factory.mktemp("models")
    windowed = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 48}
    kinds = ["full_attention", "sliding_attention"]
    return {
        "plain": make_tiny_model(folder / "plain", head_dim=32),
        "windowed": make_tiny_model(folder / "windowed", head_dim=32, **windowed),
        "mixed": make_tiny_model(folder / "mixed", head_dim=32, layer_types=kinds, **windowed),
        "other": make_tiny_model(folder / "other", seed=1, head_dim=32),
    }


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of up to 300 tokens, every other one with a shared beginning."""
    source = random.Random(seed)
    shared = [source.randrange(3, 300) for _ in range(130)]
    own = [[source.randrange(3, 300) for _ in range(source.randrange(1, 170))] for _ in range(count)]
    return [shared + each if index % 2 else each for index, each in enumerate(own)]


def answers(outputs: list[RequestOutput]) -> list[Any]:
    return [[(each.token_ids, each.logprobs) for each in output.outputs] for output in outputs]


def restored(llm: LLM) -> int:
    return llm.engine.counters.kv_store.tokens_restored


@pytest.mark.parametrize(
    ("model", "kv"), [("plain", "plain"), ("windowed", "plain"), ("plain", KIVI), ("plain", FIRST)]
)
@pytest.mark.parametrize("second", [{}, {"step_tokens": 50}, {"kv_cache_bytes": 700 << 10}, {"kernels": "cpu"}])
def test_a_second_run_restores_what_the_first_computed(
    models: dict[str, Path], tmp_path: Path, model: str, kv: str, second: dict[str, Any]
) -> None:
    prompts = make_prompts(12)
    with open_model(models[model], None, kv=kv) as alone:
        expected = answers(alone.generate(prompts, PARAMS))
    with open_model(models[model], tmp_path, kv=kv) as first:
        assert answers(first.generate(prompts, PARAMS)) == expected
        computed = first.engine.counters.computed_prompt_tokens
        stored = first.engine.counters.kv_store.blocks_written
        assert restored(first) == 0 < stored
    with open_model(models[model], tmp_path, kv=kv, **second) as again:
        assert answers(again.generate(prompts, PARAMS)) == expected
        counters = again.engine.counters
        assert counters.kv_store.blocks_written <= 0.1 * stored
        assert restored(again) > 0 and counters.kv_store.blocks_refused == 0
        assert counters.computed_prompt_tokens < (0.6 if second.get("kv_cache_bytes") else 0.3) * computed


@pytest.mark.skipif(sys.platform != "linux", reason="the system cannot be asked to read ahead")
def test_the_disk_reads_what_the_next_wants_while_others_compute(models: dict[str, Path], tmp_path: Path) -> None:
    source = random.Random(0)
    prompts = [[source.randrange(3, 300) for _ in range(400)] for _ in range(24)]
    with open_model(models["plain"], tmp_path, schedule="fcfs", max_sequences=1) as first:
        first.generate(prompts, SamplingParams(max_tokens=2))
    (blocks,) = tmp_path.glob("*.blocks")
    drop_from_memory(blocks)
    with open_model(models["plain"], tmp_path, max_sequences=1) as again:
        for name, prompt in (("runs", prompts[0]), ("waits", prompts[-1])):
            again.engine.add(Request(name, tuple(prompt), PARAMS))
        again.engine.step()
        assert again.engine.waiting == 1
        # Records lie in the order of their computation: what the two want is at the ends.
        share, patience = len(list_in_memory(blocks)) // len(prompts), time.monotonic() + 60
        while time.monotonic() < patience:
            found = list_in_memory(blocks)
            if all(found[: share // 2]) and all(found[-share // 2 :]):
                break
            time.sleep(0.01)
        assert all(found[: share // 2]) and all(found[-share // 2 :]) and not any(found[8 * share : -8 * share])


@pytest.mark.parametrize("kv", sorted(POLICIES))
def test_policies_that_share_prefixes_restore_them_and_others_say_so(
    models: dict[str, Path], tmp_path: Path, kv: str
) -> None:
    prompts = make_prompts(6)
    kv = "minicache(start=0)" if kv == "minicache" else kv
    with open_model(models["plain"], None, kv=kv) as alone:
        expected = answers(alone.generate(prompts, PARAMS))
        shares = alone.engine.cache.layout.shares_prefixes
    if not shares:
        with pytest.raises(InputError, match=f"with kv {kv} no prefixes are shared"):
            open_model(models["plain"], tmp_path, kv=kv)
        return
    for again in (False, True):
        with open_model(models["plain"], tmp_path, kv=kv) as llm:
            assert answers(llm.generate(prompts, PARAMS)) == expected
            assert (restored(llm) > 0) == again


@pytest.mark.parametrize(("model", "tracks"), [("plain", 1024), ("mixed", 1024), ("mixed", 0)])
def test_output_that_read_a_part_of_the_cache_is_not_kept_for_prompts(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, tracks: int
) -> None:
    monkeypatch.setattr(tier, "MOST_TRACKS", tracks)
    # Output reads three blocks, a prompt all of its five and more.
    kv, prompt = "infllm(topk=1, init=1, local=1)", make_prompts(2)[1]
    with open_model(models[model], tmp_path, kv=kv) as first:
        (output,) = first.generate([prompt], replace(PARAMS, max_tokens=100))
    longer = [*prompt, *output.outputs[0].token_ids, 5, 6, 7]
    with open_model(models[model], None, kv=kv) as alone:
        expected = answers(alone.generate([longer], PARAMS))
    for known in (prompt, longer):
        with open_model(models[model], tmp_path, kv=kv) as again:
            assert answers(again.generate([longer], PARAMS)) == expected
            assert restored(again) == len(known) // 32 * 32


def test_a_sequence_takes_nothing_for_its_output_that_a_prompt_has_computed() -> None:
    layout = replace(CacheLayout.from_windows([None], 4), shares_output=False)
    for shares, found in ((False, 2), (True, 4)):
        ledger = KVLedger(replace(layout, shares_output=shares), 20)
        tokens = list(range(20))
        prompt = Sequence(Request("prompt", tuple(tokens), PARAMS), 0, 1, tokens)
        ledger.admit(prompt, 0)
        ledger.grow(prompt, 20)
        prompt.computed = 20
        ledger.publish(prompt)
        # As it is after a preemption: nothing is computed, and some output is known.
        waiting = Sequence(Request("waiting", tuple(tokens[:10]), PARAMS), 0, 2, tokens[:19])
        assert len(ledger.match(waiting).nodes) == ledger.count_sharable(waiting) == found


@pytest.mark.parametrize(
    ("model", "kv"), [("plain", "plain"), ("windowed", "plain"), ("plain", KIVI), ("plain", FIRST)]
)
def test_blocks_are_those_of_the_books_at_every_step(
    models: dict[str, Path], tmp_path: Path, model: str, kv: str
) -> None:
    for seed in range(6):
        source = random.Random(seed)
        settings = {"step_tokens": source.choice([40, 200, 1024]), "max_sequences": source.choice([2, 8])}
        memory = source.choice([500 << 10, 1 << 20, 8 << 20])
        retain = source.choice([0, 100 << 10, 1 << 30])
        options = settings | {"kv_cache_bytes": memory, "prefix_retain_bytes": retain, "kv": kv}
        with open_model(models[model], tmp_path, **options) as llm:
            for index, prompt in enumerate(make_prompts(10, seed // 2)):
                program = f"program {index % 2}" if seed % 2 else ""
                llm.engine.add(Request(str(index), tuple(prompt), PARAMS, program=program))
            llm.engine.keep = lambda sequence: 0.01
            while llm.engine.unfinished:
                llm.engine.step()
                check_ledger(llm.engine.state.ledger, llm.engine.state.running)
            assert llm.engine.state.ledger.used_blocks == 0
            assert restored(llm) > 0 or seed % 2 == 0


def test_what_was_evicted_in_one_run_comes_back_in_it(models: dict[str, Path], tmp_path: Path) -> None:
    first, second = make_prompts(2)[1], make_prompts(2, 5)[1]
    with open_model(models["plain"], tmp_path, prefix_retain_bytes=0) as llm:
        expected = answers(llm.generate([first, second], PARAMS))
        assert answers(llm.generate([first, second], PARAMS)) == expected
        sharable = sum((len(each) - 1) // 32 * 32 for each in (first, second))
        assert restored(llm) == sharable == llm.engine.counters.cached_prompt_tokens


def test_only_what_is_the_same_in_everything_is_found(models: dict[str, Path], tmp_path: Path) -> None:
    prompts = make_prompts(4)
    with open_model(models["plain"], tmp_path) as llm:
        llm.generate(prompts, PARAMS)
    for model, options in [
        ("other", {}),
        ("plain", {"kv": KIVI}),
        ("plain", {"block_size": 16}),
        ("plain", {"precision": "bf16"}),
        ("plain", {"kernels": "reference"}),
        ("plain", {"instruction_set": "portable"}),
        ("plain", {"max_context": 512}),
    ]:
        with open_model(models[model], tmp_path, **options) as llm:
            llm.generate(prompts, PARAMS)
            assert restored(llm) == 0, (model, options)
    with open_model(models["plain"], tmp_path, seed=3, step_tokens=77) as llm:
        llm.generate(prompts, PARAMS)
        assert restored(llm) > 0


def test_a_cache_that_is_changed_goes_on_with_its_own_blocks(models: dict[str, Path], tmp_path: Path) -> None:
    prompts = make_prompts(4)
    with open_model(models["plain"], tmp_path) as llm:
        expected, counts = answers(llm.generate(prompts, PARAMS)), llm.engine.counters.kv_store
        written = counts.blocks_written
        change_kv(llm.engine, replace(llm.options, kv=KIVI))
        llm.generate(prompts, PARAMS)
        assert counts.tokens_restored == 0 and counts.blocks_written > written
        change_kv(llm.engine, llm.options)
        assert answers(llm.generate(prompts, PARAMS)) == expected
        before = counts.tokens_restored
        assert restored(llm) == before > 0
        # Equal policies find each other's blocks, however they are written.
        llm.use_kv("kivi( first=0,residual=40, v=2 )", 32)
        assert llm.options.kv == llm.resolved["kv"] == "kivi(v=2, residual=40, first=0)"
        llm.generate(prompts, PARAMS)
        assert counts.tokens_restored > before


def test_a_cache_that_cannot_be_changed_keeps_its_blocks_on_disk(models: dict[str, Path], tmp_path: Path) -> None:
    prompt = make_prompts(2)[1][:70]
    # Room for three blocks of 32 tokens, and for none of 128.
    with open_model(models["plain"], tmp_path, kv_dir_bytes=130_000) as llm:
        counts = llm.engine.counters.kv_store
        llm.engine.add(Request("open", tuple(prompt), PARAMS))
        with pytest.raises(ValueError, match="1 unfinished requests"):
            llm.use_kv(KIVI, 32)
        llm.engine.abort("open")
        with pytest.raises(InputError, match="holds no KV block"):
            llm.use_kv("plain", 128)
        assert llm.engine.cache.layout.block_size == 32
        llm.generate([prompt], PARAMS)
        assert counts.blocks_written == 2
        llm.use_kv("plain", 32)
        llm.generate([prompt], PARAMS)
        assert counts.tokens_restored == 64
        llm.use_kv(KIVI, 32)
        llm.generate([prompt], PARAMS)
        assert counts.blocks_written > 2
        # What it has left is locked no more.
        with open_model(models["plain"], tmp_path) as other:
            assert other.engine.cache.tier is not None and other.engine.cache.tier.store.writable


def test_nothing_crosses_between_owners(models: dict[str, Path], tmp_path: Path) -> None:
    prompt = tuple(make_prompts(2)[1])
    counts = []
    for owner in ("first", "second", "", "first"):
        with open_model(models["plain"], tmp_path) as llm:
            llm.engine.add(Request("0", prompt, PARAMS, owner=owner))
            while llm.engine.unfinished:
                llm.engine.step()
            counts.append(restored(llm))
    assert counts == [0, 0, 0, (len(prompt) - 1) // 32 * 32]


def test_a_damaged_block_is_computed_again(models: dict[str, Path], tmp_path: Path) -> None:
    prompts = make_prompts(4)
    with open_model(models["plain"], tmp_path) as llm:
        expected = answers(llm.generate(prompts, PARAMS))
    (path,) = tmp_path.glob("*.blocks")
    damaged = bytearray(path.read_bytes())
    for place in range(20_000, len(damaged), 100_000):
        damaged[place] ^= 0x10
    path.write_bytes(damaged)
    refused = []
    while not refused or refused[-1]:
        with open_model(models["plain"], tmp_path) as llm:
            assert answers(llm.generate(prompts, PARAMS)) == expected
            assert restored(llm) > 0
            refused.append(llm.engine.counters.kv_store.blocks_refused)
    assert 0 < sum(refused) <= len(damaged) // 100_000 + 1


@pytest.mark.parametrize("fault", ["damaged", "recycled"])
def test_a_step_is_planned_anew_where_nothing_that_was_wanted_could_be_read(
    models: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    source = random.Random(1)
    prompts = [[source.randrange(3, 300) for _ in range(200)] for _ in range(4)]
    stored, known = prompts[0], prompts[1]
    # A prompt and its output take six blocks and a bit. The pool holds three of them, the folder of the second one.
    small = {"kv_cache_bytes": 20 * 32 << 10, "kv_dir_bytes": 7 * 33 << 10, "schedule": "fcfs"}
    with open_model(models["plain"], None) as alone:
        expected = answers(alone.generate([known, stored], PARAMS))
    with open_model(models["plain"], tmp_path, **small) as writer:
        writer.generate([stored], PARAMS)
        with open_model(models["plain"], tmp_path, **small) as reader:
            if fault == "recycled":
                writer.generate(prompts[2:], PARAMS)
            else:
                (path,) = tmp_path.glob("*.blocks")
                path.write_bytes(bytes(255 - each for each in path.read_bytes()))
            for prompt in prompts[1:]:
                reader.generate([prompt], PARAMS)
            assert answers(reader.generate([known, stored], PARAMS)) == expected
            assert restored(reader) == 0
            check_ledger(reader.engine.state.ledger, reader.engine.state.running)


def test_a_sequence_that_cannot_be_let_in_goes_on_waiting() -> None:
    layout = CacheLayout.from_windows([None], 4)
    state = SchedulerState.create(layout, 8, EngineOptions())
    sequence = Sequence(Request("0", tuple(range(9)), PARAMS), 0, 0, list(range(9)))
    state.add(sequence)
    with pytest.raises(ValueError, match="4 cached tokens were planned, 0 found"):
        apply(StepPlan((Chunk(0, 4, 5),), (Admission(0, 4),)), state)
    assert list(state.waiting) == [sequence] and state.running == []
    apply(plan_step(state, state.limits), state)
    assert state.running == [sequence]


@pytest.mark.parametrize(
    ("model", "kv"), [("plain", "plain"), ("windowed", "plain"), ("mixed", "plain"), ("plain", KIVI), ("plain", FIRST)]
)
@pytest.mark.parametrize("step_tokens", [1024, 50])
def test_a_prompt_that_ends_with_a_block_comes_back_too(
    models: dict[str, Path], tmp_path: Path, model: str, kv: str, step_tokens: int
) -> None:
    source = random.Random(0)
    for length in (255, 256, 257):
        prompt = [source.randrange(3, 300) for _ in range(length)]
        found = []
        for known in (0, (length - 1) // 32 * 32):
            with open_model(models[model], tmp_path, kv=kv, step_tokens=step_tokens) as llm:
                found.append(answers(llm.generate([prompt], PARAMS)))
                assert restored(llm) == known
        assert found[0] == found[1]


def test_a_conversation_whose_next_turn_is_not_let_in_yet_stays_kept(tmp_path: Path) -> None:
    layout, tokens = CacheLayout.from_windows([None], 4, 16), list(range(20))
    first, next_turn = (
        Sequence(Request(str(index), tuple(tokens[:end]), PARAMS, program="talk"), 0, index, tokens[:end])
        for index, end in enumerate((9, 20))
    )
    store = BlockStore(tmp_path, "0" * 32, layout.block_bytes, 1 << 20)
    # What another run has computed, and what this one has kept.
    for sequence in (next_turn, first):
        ledger = KVLedger(layout, 16)
        below = tier.Tier(store, ledger, torch.zeros(16, layout.block_bytes, dtype=torch.uint8), b"root")
        length = len(sequence.tokens)
        ledger.admit(sequence, 0)
        ledger.grow(sequence, length)
        below.save([(Chunk(sequence.number, 0, length), sequence)])
        sequence.computed = length
        ledger.publish(sequence)
        ledger.keep(sequence, 100.0)
        ledger.release(sequence)
    assert below.restore([next_turn], below.room) == 4 and store.counts.tokens_restored == 8
    assert len(ledger.match(next_turn).nodes) == 4 and ("", "talk") in ledger.keeps
    ledger.expire(50.0)
    assert ("", "talk") in ledger.keeps and len(ledger.keeps) == 1
    check_ledger(ledger, [])


def test_two_at_once_share_what_the_first_had_written(models: dict[str, Path], tmp_path: Path) -> None:
    prompts = make_prompts(4)
    with open_model(models["plain"], tmp_path) as first:
        expected = answers(first.generate(prompts, PARAMS))
        with open_model(models["plain"], tmp_path) as second:
            assert answers(second.generate(prompts, PARAMS)) == expected
            assert restored(second) > 0 and second.engine.counters.kv_store.blocks_written == 0


def test_scores_need_every_token_and_take_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    prompts = make_prompts(4)
    with open_model(models["plain"], tmp_path) as llm:
        expected = [each.logprobs for each in llm.score(prompts)]
    with open_model(models["plain"], tmp_path) as llm:
        assert [each.logprobs for each in llm.score(prompts)] == expected
        assert restored(llm) == 0


def test_the_report_counts_what_came_back(tiny_model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", batch_rows(6))
    options = engine_options(tiny_model, kv_dir=str(tmp_path / "kv"), kv_dir_bytes=1 << 20)
    reports = [
        run_job(str(source), str(tmp_path / f"{name}.jsonl"), options, SamplingOptions(), RunOptions(quiet=True))
        for name in ("first", "second")
    ]
    assert reports[0]["kv_store"]["tokens_restored"] == 0 < reports[1]["kv_store"]["tokens_restored"]
    assert reports[1]["computed_prompt_tokens"] < reports[0]["computed_prompt_tokens"]
    assert "tokens restored instead of computed" in format_report(reports[1])
    assert "kv_store" not in run(tiny_model, source, tmp_path / "plain.jsonl")


def test_what_a_killed_run_computed_is_found(tiny_model: Path, tmp_path: Path) -> None:
    source, folder = write_lines(tmp_path / "in.jsonl", batch_rows(40)), tmp_path / "kv"
    sampling, quiet = SamplingOptions(max_tokens=40), RunOptions(quiet=True)
    settings = ["--model", str(tiny_model), "--precision", "fp32", "--block-size", "16", "--kv-cache-bytes", "4MiB"]
    settings += ["--threads", "1", "--max-sequences", "2", "--max-tokens", "40", "--kv-dir", str(folder), "--quiet"]
    output = tmp_path / "killed.jsonl"
    child = subprocess.Popen([sys.executable, "-m", "headrace", "run", str(source), "-o", str(output), *settings])
    while child.poll() is None and sum(path.stat().st_size for path in folder.glob("*.blocks")) < 20 * 8192:
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL and not output.exists()
    for name, options in [("plain", {}), ("again", {"kv_dir": str(folder)})]:
        engine = engine_options(tiny_model, **options)
        report = run_job(str(source), str(tmp_path / f"{name}.jsonl"), engine, sampling, quiet)
    assert without_times(tmp_path / "again.jsonl") == without_times(tmp_path / "plain.jsonl")
    assert report["kv_store"]["tokens_restored"] > 0 and report["kv_store"]["blocks_refused"] == 0


def test_a_folder_where_nothing_can_be_shared_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prefix_cache is off"):
        open_model(models["plain"], tmp_path, prefix_cache=False)
    with pytest.raises(InputError, match="holds no KV block"):
        open_model(models["plain"], tmp_path, kv_dir_bytes=100)
