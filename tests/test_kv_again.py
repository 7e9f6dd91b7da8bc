"""Policies that make output smaller again and again: what stays, how much is held, and what that lets in."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kv_shrinking import PromptDriver, make_text, open_model
from test_models import GEMMA, make_pair
from tiny import make_tiny_model
from torch import Tensor

from headrace import LLM, SamplingParams
from headrace.cache.checks import check_ledger
from headrace.cache.layout import Shrink
from headrace.cache.paged import PagedCache
from headrace.cache.policies.base import KVPolicy, KVShape, LayerStep
from headrace.cache.policies.choice import make_policy
from headrace.cache.policies.kvmerger import KVMerger, Tokens
from headrace.cache.policies.shrinking import Context, Evicting, Shrinking, choose_highest
from headrace.checkpoint import open_checkpoint
from headrace.core import Chunk, InputError, Request, Sequence
from headrace.core import SamplingParams as Params
from headrace.engine.batch import build_batch
from headrace.judge.driver import CacheDriver
from headrace.kernels import choose_kernels
from headrace.kernels.base import AttentionSpec
from headrace.kernels.contexts import read_blocks, write_slots
from headrace.kernels.cpu import CpuKernels
from headrace.model import ModelSettings, load_model

SIZE = 16
POLICIES = [
    "streaming(keep=40, every=32)",
    "tova(keep=40, every=32)",
    "snapkv(keep=40, every=32, window=8, kernel=3)",
    "h2o(keep=40, every=32)",
    "h2o(keep=0.3, every=64, recent=0.5, divide=False)",
    "scissorhands(keep=40, every=32, history=20, recent=5)",
    "kvmerger(keep=0.4, every=32)",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 3}
    return make_tiny_model(tmp_path_factory.mktemp("models") / "again", **changes)


class Watched:
    """A policy, and what it saw of the first layer: queries since the last time, and what was held before each time."""

    def __init__(self, policy: KVPolicy) -> None:
        self.policy = policy
        self.queries: list[Tensor] = []
        self.times: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def attend(self, step: LayerStep) -> Tensor:
        if step.layer == 0:
            self.queries.append(step.queries.clone())
            if step.batch.shrinks is not None:
                begin = 0 if step.batch.begins is None else int(step.batch.begins[0])
                blocks = step.batch.block_tables[step.cache.group][0, begin // SIZE :].long()
                end = int(step.batch.context_lengths[0])
                keys, values = (each[:, : end - begin] for each in read_blocks(step.cache, blocks))
                bias = None
                if step.cache.bias is not None:
                    bias = step.cache.bias[blocks].transpose(0, 1).flatten(1)[:, : end - begin].clone()
                    # The policy will say so: what has just come stands for itself.
                    bias[:, end - begin - len(step.queries) :] = 0
                self.times.append((torch.cat(self.queries), keys, values, bias))
                self.queries.clear()
        return self.policy.attend(step)


def find_mass(queries: Tensor, keys: Tensor, bias: Tensor | None, scale: float, share: float) -> Tensor:
    """By brute force: what queries [Q, heads, D], the last ones, give to tokens [kv heads, S]."""
    mass = torch.zeros(keys.shape[:2], dtype=torch.float64)
    for place, query in enumerate(queries, keys.shape[1] - len(queries) + 1):
        for head, each in enumerate(query):
            own = head // (len(query) // len(keys))
            scores = keys[own, :place].double() @ each.double() * scale
            weights = (scores if bias is None else scores + bias[own, :place].double()).softmax(0)
            mass[own, :place] += (weights * place >= 1) + weights * share if share else weights
    return mass.float()


@pytest.mark.parametrize("kv", POLICIES)
def test_what_stays_is_chosen_by_the_attention_since_the_last_time(kv: str, folder: Path) -> None:
    model = load_model(open_checkpoint(str(folder)), choose_kernels("cpu", "cpu"), ModelSettings("fp32"))
    driver, policy = PromptDriver(model, kv), make_policy(kv)
    assert isinstance(policy, Shrinking)
    watched = Watched(policy)
    driver.cache.policy = watched  # type: ignore[assignment]
    number = driver.add(make_text(150), make_text(110, seed=1))
    driver.feed({number: 150})
    driver.feed({number: 10})
    sequence = driver.sequences[number]
    while sequence.computed < 260:
        times, held = len(watched.times), sequence.dropped
        driver.feed({number: 1})
        if len(watched.times) == times:
            assert sequence.dropped == held
            continue
        assert sequence.computed % policy.shrink.every == 0
        queries, keys, values, bias = watched.times[-1]
        window = policy.shrink.queries
        counted = queries if window is None else queries[len(queries) - min(window, len(queries)) :]
        seen = torch.arange(keys.shape[1], 0, -1).clamp(max=len(counted))
        mass = find_mass(counted, keys, bias, model.attention[0].scale, policy.find_share(3))
        count = keys.shape[1] - (sequence.dropped - held) * SIZE
        mine = driver.read(number, 0)
        if isinstance(policy, Evicting):
            context = Context(0, mass, seen, sequence.computed)
            chosen = choose_highest(policy.score(context, count).expand(2, -1), count)
            expected = Tokens(*(each.gather(1, chosen[..., None].expand(-1, -1, 16)) for each in (keys, values)), seen)
        else:
            assert isinstance(policy, KVMerger) and bias is not None and mine[2] is not None
            expected = policy.merge_tokens(Tokens(keys, values, bias.exp()), mass, count)
            torch.testing.assert_close(mine[2].exp(), expected.sizes)
        torch.testing.assert_close(mine[:2], expected[:2], atol=1e-5, rtol=1e-5)
    assert len(watched.times) >= 3


@pytest.mark.parametrize("kv", POLICIES)
def test_no_more_is_held_than_is_said(kv: str, folder: Path) -> None:
    with open_model(folder, kv, step_tokens=64) as llm:
        engine, shrink = llm.engine, llm.engine.cache.layout.shrink
        assert shrink is not None
        for place, length in enumerate((20, 130, 200)):
            params = Params(max_tokens=150, ignore_eos=True)
            engine.add(Request(str(place), tuple(make_text(length, seed=place)), params))
        while engine.unfinished:
            engine.step()
            ledger = engine.state.ledger
            check_ledger(ledger, list(engine.state.running))
            for each in engine.state.running:
                prompt = each.prompt_length if each.computed < each.prompt_length else 0
                held = ledger.holdings[each.number].private / len(ledger.full_groups) * SIZE
                most = shrink.count_most(each.computed, prompt, SIZE)
                assert held <= -(-most // SIZE) * SIZE
                assert ledger.holdings[each.number].private <= ledger.layout.blocks_for(each.computed, prompt=prompt)
        assert engine.state.ledger.used_blocks == 0


def test_a_budget_lets_in_as_many_as_it_will_ever_hold(folder: Path) -> None:
    prompts = [make_text(40, seed=seed) for seed in range(8)]
    params = SamplingParams(max_tokens=300, ignore_eos=True)

    def answer(llm: LLM) -> list[list[int]]:
        return [each.outputs[0].token_ids for each in llm.generate(prompts, params, progress=False)]

    with open_model(folder, "h2o(keep=48, every=32)") as llm:
        expected, layout = answer(llm), llm.engine.cache.layout
        steps = llm.engine.counters.steps
        # 48 tokens and 32 more, where 340 would be 22 blocks.
        assert layout.blocks_for(340) == 5 * len(layout.groups)
        room = 8 * layout.blocks_for(340) * layout.block_bytes
    with open_model(folder, "h2o(keep=48, every=32)", kv_cache_bytes=room, max_sequences=8) as llm:
        assert answer(llm) == expected
        counters = llm.engine.counters
        assert counters.preemptions == 0 and counters.kv_peak_bytes <= room
        # All eight ran together.
        assert counters.steps == steps


def test_a_token_that_matters_now_and_then_survives_a_thousand_steps() -> None:
    """Scissorhands with a budget of 112: every 50th query looks for one token, all others for the first one."""
    torch.manual_seed(0)
    policy, heads, head = make_policy("scissorhands(keep=48, every=64, history=64)"), 2, 32
    shape, kernels = KVShape((None,), heads, head, torch.float32), CpuKernels()
    cache = PagedCache(shape, policy, SIZE, 200, "cpu")
    (first, planted), spec = torch.randn(2, heads, head), AttentionSpec(head**-0.5)
    request = Request("0", tuple([1] * 20), Params(max_tokens=2000))
    sequence, free = Sequence(request, 0, 0, [1] * 1100, tables=[[]]), list(range(200))
    while sequence.computed < 1100:
        length = 20 if sequence.computed == 0 else 1
        table = sequence.tables[0]
        table += [free.pop() for _ in range(-(-(sequence.computed + length) // SIZE) - len(table))]
        batch = build_batch([(Chunk(0, sequence.computed, length), sequence)], cache.layout, "cpu")
        keys, values = torch.randn(2, heads, length, head)
        if sequence.computed == 0:
            keys[:, 0], keys[:, 7] = first, planted
        write_slots(cache.layers[0], torch.tensor(table), sequence.computed, keys, values)
        wanted = planted if sequence.computed % 50 == 0 else first
        queries = wanted * 3 + torch.randn(length, heads, head)
        policy.attend(LayerStep(0, queries, cache.layers[0], batch, spec, kernels))
        sequence.computed += length
        if batch.shrinks is not None:
            sequence.dropped += int(batch.shrinks[0])
        held = torch.tensor(table[sequence.dropped :])
        assert len(held) * SIZE <= 48 + 64 + 2 * SIZE
        found = read_blocks(cache.layers[0], held)[0][:, : sequence.computed - sequence.dropped * SIZE]
        assert bool((found == planted[:, None]).all(-1).any(-1).all()), sequence.computed


def test_random_tokens_are_others_each_time() -> None:
    policy, mass = make_policy("random(keep=100, every=32)"), torch.zeros(2, 160)
    assert isinstance(policy, Evicting)
    chosen = [
        choose_highest(policy.score(Context(layer, mass, mass[0], end), 100), 100).tolist()
        for layer in (0, 1)
        for end in (160, 192, 224)
    ]
    assert len({str(head) for each in chosen for head in each}) == 12
    assert all(head[:4] == [0, 1, 2, 3] for each in chosen for head in each)


def test_when_and_how_much_goes() -> None:
    source = random.Random(0)
    for _ in range(200):
        keep = source.choice([source.random() * 0.9 + 0.05, source.randrange(1, 200)])
        shrink = Shrink(keep, SIZE * source.randrange(1, 6), source.choice([None, 1, 40]))
        prompt, dropped, length = source.randrange(1, 300), 0, 0
        while length < 600:
            following = shrink.find_next(prompt, length)
            assert following == (prompt if length < prompt else (length // shrink.every + 1) * shrink.every)
            first = shrink.find_observed(prompt, following)
            assert first >= (0 if length < prompt else prompt) and first < following
            assert shrink.queries is None or following - first <= shrink.queries
            step = shrink.cut(prompt, length, source.randrange(1, 80))
            assert length + step <= following
            length += step
            assert length - dropped * SIZE <= shrink.count_most(length, prompt if length <= prompt else 0, SIZE)
            if length == following:
                lost = shrink.count_dropped(length, SIZE)
                assert lost >= dropped
                dropped = lost
                assert length - dropped * SIZE <= shrink.count_kept(length) + SIZE - 1
        exact = Shrink(keep, shrink.every)
        assert exact.count_most(10**6, 0, SIZE) - exact.count_kept(10**6) < shrink.every + SIZE


def test_without_every_output_stays() -> None:
    shrink = Shrink(0.5)
    assert shrink.find_next(100, 40) == 100 and shrink.find_next(100, 100) is None
    assert shrink.cut(100, 100, 37) == 37 and shrink.count_most(500, 0, SIZE) == 500


def test_what_counts_cannot_be_taken_back(folder: Path) -> None:
    with open_model(folder, "h2o(keep=48, every=32)") as llm:
        driver = CacheDriver(llm.engine.model, make_policy("h2o(keep=48, every=32)"), SIZE, 1, 200)
        sequence = driver.start(make_text(60))
        driver.read(sequence)
        driver.feed([(sequence, [5])])
        with pytest.raises(ValueError, match="cannot go back"):
            driver.ledger.truncate(sequence, 60)


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
@pytest.mark.parametrize("kv", ["snapkv(keep=48, every=32)", "kvmerger(keep=48, every=32)"])
def test_what_crosses_a_border_is_fed_in_parts(kv: str, family: str, folder: Path) -> None:
    if family == "Llama":
        model = load_model(open_checkpoint(str(folder)), choose_kernels("cpu", "cpu"), ModelSettings("fp32"))
    else:
        # Sliding windows stay as they are beside layers that are made smaller.
        _, model = make_pair(family, GEMMA | {"sliding_window": 40}, choose_kernels("cpu", "cpu"))
    tokens = [token % 90 for token in make_text(150, seed=2)]
    prompt, further, found = tokens[:60], tokens[60:], []
    for parts in ([further], [further[:40], further[40:]], [[each] for each in further]):
        driver = CacheDriver(model, make_policy(kv), SIZE, 1, 200)
        sequence = driver.start(prompt)
        driver.read(sequence)
        found.append([driver.feed([(sequence, part)]) for part in parts][-1])
        assert sequence.dropped == Shrink(48).count_dropped(128, SIZE)
        check_ledger(driver.ledger, [sequence])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_wrong_settings_are_refused() -> None:
    shape = KVShape((None,), 2, 16, torch.float32)
    with pytest.raises(InputError, match="every must be a multiple of the block size, 16, got 24"):
        make_policy("h2o(every=24)").arrange(shape, SIZE)
    with pytest.raises(InputError, match="every must be a whole number"):
        make_policy("h2o(every=-16)")
    with pytest.raises(InputError, match="leave out every or kivi"):
        make_policy("h2o(every=32) + kivi(k=4, v=4)")
