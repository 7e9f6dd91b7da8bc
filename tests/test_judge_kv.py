"""The judge of KV policies: nothing is lost by the plain cache, bytes are counted as a hand counts them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny_model

from headrace import LLM
from headrace.cache.layout import CacheGroup, CacheLayout, Shrink
from headrace.cache.policies.base import KVShape, LayerStep, Plane
from headrace.cache.policies.choice import make_policy
from headrace.cache.policies.kivi import Kivi
from headrace.cache.policies.plain import Plain
from headrace.checkpoint import open_checkpoint
from headrace.cli import main
from headrace.core import InputError
from headrace.engine.loading import resolve_options
from headrace.engine.tuned import save_tuned
from headrace.judge.contexts import TASKS
from headrace.judge.contexts_summary import summarise
from headrace.judge.driver import CacheDriver
from headrace.judge.episodes import MODES, Episode, Turn
from headrace.judge.kv import TAIL, WAYS, Degradation, KVJudge, Way, choose_windows
from headrace.judge.kv_job import make_prompts, measure_job
from headrace.judge.kv_room import Room, count_batch, find_room
from headrace.judge.shared_contexts import ContextsJudge, write_script
from headrace.kernels.base import LayerCache
from headrace.kernels.contexts import read_blocks
from headrace.options import EngineOptions

NOTHING = Degradation(0.0, 0.0, 0.0, 1.0)
CONTEXT = 100
EPISODE = Episode(
    "The mill by the river grinds wheat, the one on the hill grinds rye, and the old one stands still.\n",
    (
        Turn("\nThe mill by the river grinds", " wheat"),
        Turn("\nThe mill on the hill grinds", " rye", (" rye", " wheat and oats", " oats")),
        Turn("\nThe old mill", " stands still"),
    ),
    "mills",
)


class Latest:
    """See `KVPolicy`. Of a prompt the latest tokens stay: a share of it, in whole blocks."""

    form = None
    residual = 1
    planes: tuple[Plane, ...] = ()

    def __init__(self, keep: float) -> None:
        self.keep = keep

    def arrange(self, shape: KVShape, block_size: int) -> CacheLayout:
        layout = Plain().arrange(shape, block_size)
        return dataclasses.replace(layout, shares_prefixes=False, shrink=Shrink(self.keep))

    def attend(self, step: LayerStep) -> torch.Tensor:
        # The latest tokens are where they are to be: nothing moves.
        return step.kernels.attention(step.queries, step.cache, step.batch, step.spec)


class Short(Kivi):
    """See `KVPolicy`. KIVI of which no step computes more than 40 tokens of a sequence."""

    def arrange(self, shape: KVShape, block_size: int) -> CacheLayout:
        return dataclasses.replace(super().arrange(shape, block_size), most_chunk=40)


def ignore(_: str) -> None:
    pass


def count_texts(llm: LLM, episode: Episode, turn: int, mode: str) -> tuple[list[int], list[int]]:
    """Tokens before a turn's gold answer, part by part as an episode is cut, and the answer's."""
    asked = episode.turns[turn]
    tokens = llm.tokenizer.encode(episode.context)
    for earlier in episode.turns[:turn] if mode == "multi_turn" else ():
        tokens += llm.tokenizer.encode(earlier.query, False) + llm.tokenizer.encode(earlier.answer, False)
    return tokens + llm.tokenizer.encode(asked.query, False), llm.tokenizer.encode(asked.answer, False)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A tiny model whose heads are large enough to be sealed."""
    folder = make_tiny_model(tmp_path_factory.mktemp("judge") / "wide", head_dim=32)
    with LLM(str(folder), precision="fp32", kv_cache_bytes=1 << 22, threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def judge(llm: LLM) -> KVJudge:
    tokens = [3 + (place * place + 7 * place // 5) % 300 for place in range(1000)]
    return KVJudge(llm.engine.model, choose_windows(tokens, CONTEXT, 3), 32, ignore)


def test_windows_are_spread_over_the_text() -> None:
    size = CONTEXT + TAIL + 1
    windows = choose_windows(list(range(10 * size)), CONTEXT, 2)
    assert [window[0] // size for window in windows] == [2, 7] and {len(window) for window in windows} == {size}
    with pytest.raises(InputError, match="fewer windows"):
        choose_windows(list(range(2 * size - 1)), CONTEXT, 2)
    with pytest.raises(InputError, match="use 2 or more"):
        choose_windows(list(range(size)), CONTEXT, 1)


def test_the_plain_cache_loses_nothing(judge: KVJudge, llm: LLM) -> None:
    found = judge.judge("plain")
    assert found.prefix == found.stream == NOTHING
    assert (found.context, found.windows) == (CONTEXT, 3)
    # 4 blocks of 32 tokens, 2 layers, keys and values of 2 heads of 32 in float32.
    assert found.bytes_per_token == 4 * 32 * 2 * 2 * 2 * 32 * 4 / CONTEXT
    assert found.attention_ns > 0
    nlls = [value for each in llm.score(judge.windows) for value in each.logprobs[-TAIL:]]
    assert judge.find_perplexity() == pytest.approx(math.exp(-sum(map(float, nlls)) / len(nlls)), rel=1e-5)  # type: ignore[arg-type]


def test_a_lossy_cache_loses_and_a_finer_one_loses_less(judge: KVJudge) -> None:
    coarse, fine = judge.judge("kivi(k=2, v=2)"), judge.judge("kivi(k=8, v=8)")
    for found in (coarse, fine):
        assert found.prefix.kl > 0 and found.stream.kl > 0
        assert found.prefix != found.stream and found.prefix.error > 0
    assert coarse.prefix.kl > 10 * fine.prefix.kl and coarse.stream.kl > 10 * fine.stream.kl
    assert coarse.prefix.top1 < 1 and coarse.stream.kl > coarse.prefix.kl
    layout = make_policy("kivi(k=2, v=2)").arrange(judge.model.kv_shape, 32)
    # Of 100 tokens 96 are in three full blocks; a query at 100 reads exactly from the block of token 69 on.
    blocks = sum(4 if group.sealed else 2 for group in layout.groups)
    assert coarse.bytes_per_token == blocks * layout.block_bytes / CONTEXT


def test_what_is_kept_for_the_whole_text_loses_nothing(judge: KVJudge) -> None:
    found = judge.judge("kivi(k=2, v=2, residual=4096)")
    assert found.prefix == found.stream == NOTHING


def test_a_policy_that_makes_prompts_smaller(judge: KVJudge) -> None:
    whole, half = (judge.read(partial(Latest, keep), "stream", "latest") for keep in (100, 50))
    assert judge.compare(whole.hidden) == NOTHING
    assert judge.compare(half.hidden).kl > 0
    # 50 of 100 tokens may go: one block of 32 does.
    assert half.bytes_per_token == whole.bytes_per_token * 3 / 4
    assert torch.equal(half.hidden, judge.read(partial(Latest, 50), "prefix", "latest").hidden)


@pytest.mark.parametrize("way", WAYS)
def test_steps_may_be_short(judge: KVJudge, way: Way) -> None:
    short, long = (judge.read(policy, way, "short") for policy in (Short, Kivi))
    assert torch.equal(short.hidden, long.hidden) and short.bytes_per_token == long.bytes_per_token
    assert judge.compare(short.hidden).kl > 0


def test_the_driver_keeps_the_bytes_of_what_it_fed(llm: LLM) -> None:
    driver = CacheDriver(llm.engine.model, Plain(), 32, 2, 70)
    sequences = [driver.start([5] * 40), driver.start([6] * 33)]
    hidden = driver.feed([(sequences[0], [5] * 40), (sequences[1], [6] * 33)])
    assert hidden.shape == (2, llm.engine.model.config.hidden_size)
    assert [sequence.computed for sequence in sequences] == [40, 33]
    cache: LayerCache = driver.cache.layers[1]
    keys, _ = read_blocks(cache, torch.tensor(sequences[1].tables[cache.group]))
    assert bool(keys[:, :33].any()) and not bool(keys[:, 33:].any())
    assert driver.used_bytes == 4 * driver.cache.layout.block_bytes


def test_room_is_what_a_hand_counts() -> None:
    plain = CacheLayout(32, (CacheGroup((0, 1), None, 100),))
    assert find_room(plain, 1000, 128, 256) == Room(32, 36)
    # 10 blocks of 200 bytes hold nothing; 36 hold one text, 71 no second one, 72 two.
    assert [count_batch(plain, 1000, 128, 256, 200 * blocks) for blocks in (10, 36, 71, 72)] == [0, 1, 1, 2]
    tail = CacheLayout(32, (CacheGroup((0, 1), None, 10, True), CacheGroup((0,), 32, 20), CacheGroup((1,), 32, 20)))
    # While 256 tokens are computed the exact groups have 8 blocks each and the one before; then two each at most.
    assert find_room(tail, 1000, 128, 256) == Room(32 + 2 * 9, 36 + 2 * 2)
    assert [count_batch(tail, 1000, 128, 256, 20 * blocks) for blocks in (49, 50, 89, 90)] == [0, 1, 1, 2]
    shrunk = dataclasses.replace(plain, shares_prefixes=False, shrink=Shrink(0.5))
    # 500 of 1,000 tokens may go: 15 blocks of 32 do.
    assert find_room(shrunk, 1000, 128, 256) == Room(32, 36 - 15)
    assert [count_batch(shrunk, 1000, 128, 256, 200 * blocks) for blocks in (31, 32, 52, 53)] == [0, 1, 1, 2]


def test_a_jobs_prompts_are_the_contexts_and_none_begins_like_another() -> None:
    contexts = [list(range(start, start + 50)) for start in (0, 100, 200)]
    assert make_prompts(contexts, 2) == contexts
    prompts = make_prompts(contexts, 8)
    assert len(prompts) == 8 and len({prompt[0] for prompt in prompts}) == 8
    assert [sorted(prompt) for prompt in prompts] == [contexts[place % 3] for place in range(8)]


def test_a_small_job_has_a_speed(llm: LLM) -> None:
    options = dataclasses.replace(llm.options, kv_cache_bytes=1 << 20)
    for kv in ("plain", "kivi(k=4, v=4)"):
        speed = measure_job(llm.engine.model, llm.tokenizer, options, kv, [[4] * 50, [7] * 60], 5)
        assert speed is not None and speed > 0


@pytest.mark.parametrize("memory", [1, (3 << 15) - 1, 3 << 15])
def test_a_memory_that_is_too_small_for_one_prompt_gives_no_speed(llm: LLM, memory: int) -> None:
    # 65 tokens in blocks of 32 KiB.
    options = dataclasses.replace(llm.options, kv_cache_bytes=memory)
    speed = measure_job(llm.engine.model, llm.tokenizer, options, "plain", [[4] * 20, [7] * 60], 5)
    assert (speed is not None) == (memory == 3 << 15)


def test_answers_of_the_plain_cache_are_those_of_score(llm: LLM) -> None:
    judges = {
        mode: ContextsJudge(llm.engine.model, llm.tokenizer, [EPISODE], mode, 32, ignore)  # type: ignore[arg-type]
        for mode in MODES
    }
    for mode, judge in judges.items():
        (scores,) = judge.judge("plain")
        assert scores.full == scores.policy and all(all(turn.agrees) for turn in scores.policy)
        for turn, score in enumerate(scores.full):
            before, answer = count_texts(llm, EPISODE, turn, mode)
            (expected,) = llm.score([before + answer])
            assert score.logprobs == pytest.approx(expected.logprobs[-len(answer) :], abs=1e-4)
    # Nothing stands between the context and the first query in either mode.
    first = [judge.judge("plain")[0].full[0].logprobs for judge in judges.values()]
    assert first[0] == first[1]


def test_gold_answers_do_not_depend_on_how_a_text_was_kept(llm: LLM) -> None:
    # A conversation of one turn is the same text in both modes, cut elsewhere.
    alone = [dataclasses.replace(EPISODE, turns=(turn,)) for turn in EPISODE.turns]
    kept, anew = (
        ContextsJudge(llm.engine.model, llm.tokenizer, alone, mode, 32, ignore).judge("plain") for mode in MODES
    )
    assert kept == anew


def test_choices_are_right_where_the_gold_one_is_likeliest(llm: LLM) -> None:
    judge = ContextsJudge(llm.engine.model, llm.tokenizer, [EPISODE], "multi_request", 32, ignore)
    (scores,) = judge.judge("plain")
    turn = EPISODE.turns[1]
    before, _ = count_texts(llm, EPISODE, 1, "multi_request")
    sums = {}
    for choice in turn.choices:
        tokens = llm.tokenizer.encode(choice, False)
        (score,) = llm.score([before + tokens])
        sums[choice] = sum(value for value in score.logprobs[-len(tokens) :] if value is not None)
    assert scores.full[1].correct == (max(sums, key=lambda choice: sums[choice]) == turn.answer)
    likeliest = max(sums, key=lambda choice: sums[choice])
    asked = dataclasses.replace(EPISODE, turns=(dataclasses.replace(turn, answer=likeliest),))
    (other,) = ContextsJudge(llm.engine.model, llm.tokenizer, [asked], "multi_turn", 32, ignore).judge("plain")
    assert other.full[0].correct


def test_prompts_end_where_each_mode_says(llm: LLM) -> None:
    encode = llm.tokenizer.encode
    context, query = encode(EPISODE.context), encode(EPISODE.turns[0].query, False)
    turns, requests = (write_script(EPISODE, mode, llm.tokenizer) for mode in MODES)
    assert [text.steps[0] for text in turns.golds] == [context + query]
    assert [text.steps[1] for text in requests.golds[:1]] == [query] and len(requests.golds) == 3
    assert all(text.steps[0] == context for text in requests.texts)
    assert [list(text.targets.values()) for text in turns.golds] == [
        [token for gold in turns.answers for token in gold]
    ]
    assert [len(others) for others in turns.others] == [0, 2, 0]


def test_a_lossy_cache_answers_otherwise(llm: LLM) -> None:
    text = [f"{word} mills by the river grind wheat and rye all day. " * 3 for word in ("Old", "New", "Red", "Tall")]
    episodes = [TASKS["math_find"](text, seed, 200) for seed in range(2)]
    for mode in MODES:
        judge = ContextsJudge(llm.engine.model, llm.tokenizer, episodes, mode, 32, ignore)
        summary = summarise(judge.judge("kivi(k=2, v=2)"))
        assert summary.turns == 6 and summary.delta != 0 and summary.agreement < 1
        assert summarise(judge.judge("plain")).delta == 0
    long = [TASKS["retr_kv"](text, 0, 2000)]
    with pytest.raises(InputError, match="ask for smaller ones"):
        ContextsJudge(llm.engine.model, llm.tokenizer, long, "multi_turn", 32, ignore)


def test_eval_kv_from_the_command_line(llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, page = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text("The mill by the river grinds wheat. " * 500)
    common = ["--text", str(text), "--model", llm.options.model, "--precision", "fp32"]
    asked = ["eval", "kv", *common, "--kv", "plain", "--policies", "kivi(k=2, v=2)", "--windows", "2"]
    assert (
        main([*asked, "--contexts", "64,128", "--kv-cache-bytes", "4MiB", "--job", "--html", str(page), "--json"]) == 0
    )
    rows: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["kv"], row["context"]) for row in rows] == [
        (kv, context) for context in (64, 128) for kv in ("plain", "kivi(k=2, v=2)")
    ]
    assert rows[0]["prefix"] == rows[0]["stream"] == dataclasses.asdict(NOTHING)
    assert rows[1]["stream"]["kl"] > 0 and all(row["tokens_per_s"] > 0 for row in rows)
    # 6 blocks of 32 KiB for 192 tokens.
    assert rows[0]["batch"] == (4 << 20) // (6 * 32 * 1024)
    assert page.read_text().count("<svg") == 3 and "kivi(k=2, v=2) at 128" in page.read_text()
    assert main([*asked, "--contexts", "64", "--kv-cache-bytes", "195KB", "--job"]) == 0
    cells = [line.split("|")[-3:-1] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [int(batch) for batch, _ in cells] == [0, 1] and cells[0][1].strip() == "-" < cells[1][1].strip()
    assert main([*asked, "--contexts", "64"]) == 0
    shown = capsys.readouterr().out
    assert "| plain " in shown and "+0.0000 ± 0.0000" in shown and "perplexity" in shown
    text.write_text("The mill by the river grinds wheat. " * 60)
    assert main([*asked, "--contexts", "64", "--json"]) == 0
    capsys.readouterr()
    assert main([*asked, "--contexts", "64,800", "--json"]) == 2
    assert capsys.readouterr().out == "", "nothing is measured where the text is too short for one of the contexts"
    assert main([*asked, "--contexts", "64,x"]) == 2 and "--contexts" in capsys.readouterr().err
    assert main([*asked, "--contexts", "1000"]) == 2 and "context holds 1,024" in capsys.readouterr().err
    assert main(["eval", "kv", *common, "--kv", "none"]) == 2 and "no policy 'none'" in capsys.readouterr().err


def test_what_tune_prefers_does_not_count(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("The mill by the river grinds wheat.\n\n" * 200)
    common = ["--text", str(text), "--model", llm.options.model, "--precision", "fp32", "--kv", "kivi(k=2, v=2)"]
    commands = (
        ["eval", "kv", *common, "--windows", "2", "--contexts", "100", "--json"],
        ["eval", "contexts", *common, "--tokens", "200", "--task", "math_find", "--json"],
    )

    def judge_all() -> list[dict[str, Any]]:
        assert [main(command) for command in commands] == [0, 0]
        return [json.loads(line) | {"attention_ns": None} for line in capsys.readouterr().out.splitlines()]

    before = judge_all()
    options = EngineOptions(model=llm.options.model, precision="fp32", kv_cache_bytes=1 << 22)
    machine = resolve_options(options, open_checkpoint(options.model)).machine
    save_tuned(llm.model_hash, machine, "fp32", {"block_size": 64})
    with LLM(**dataclasses.asdict(options)) as tuned, LLM(**dataclasses.asdict(options) | {"kv": "kivi"}) as under_kv:
        assert (tuned.options.block_size, under_kv.options.block_size) == (64, 32)
    assert judge_all() == before


def test_eval_contexts_from_the_command_line(llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The mill by the river grinds wheat.\n\n" * 50)
    common = ["eval", "contexts", "--text", str(text), "--model", llm.options.model, "--precision", "fp32"]
    asked = [*common, "--kv", "plain", "--kv", "kivi(k=2, v=2)", "--tokens", "200", "--task", "math_find"]
    assert main([*asked, "--task", "many_shot", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["kv"], row["mode"]) for row in rows] == [
        (kv, mode) for mode in MODES for kv in ("plain", "kivi(k=2, v=2)")
    ]
    assert all(set(row["tasks"]) == {"math_find", "many_shot"} and row["turns"] == 7 for row in rows)
    assert rows[0]["delta"] == 0 and rows[1]["delta"] != 0
    assert main(asked) == 0 and "| multi_request " in capsys.readouterr().out
    assert main([*common, "--kv", "plain", "--task", "none"]) == 2
    assert "there is no task 'none'" in capsys.readouterr().err
