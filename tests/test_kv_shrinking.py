"""Policies that shrink a prompt at its end: what they keep, against brute force, and that the rest is freed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ragged import RaggedDriver
from test_models import GEMMA, make_pair
from tiny import make_tiny_model
from torch import Tensor

from headrace import LLM, SamplingParams
from headrace.cache.checks import check_ledger
from headrace.cache.policies.base import KVShape, LayerStep
from headrace.cache.policies.choice import make_policy
from headrace.cache.policies.kvmerger import KVMerger, Tokens, find_pivots, join_alike
from headrace.cache.policies.plain import Plain
from headrace.cache.policies.shrinking import protect
from headrace.checkpoint import open_checkpoint
from headrace.core import Chunk, InputError, Request, Sequence
from headrace.core import SamplingParams as Params
from headrace.engine.batch import build_batch
from headrace.kernels import choose_kernels
from headrace.kernels.contexts import read_blocks
from headrace.model import Model, ModelSettings, load_model
from headrace.schedule.pieces import count_shrinking, wanted_rows

SIZE, LENGTH = 16, 150
KINDS = ["streaming", "tova", "snapkv", "h2o", "scissorhands", "random", "kvmerger"]
Matrix = NDArray[np.float64]


class PromptDriver(RaggedDriver):
    """Its sequences are prompts that are answered. Their memory has been used before; what they lose is spoiled."""

    def __init__(self, model: Model, kv: str = "plain", seed: int = 0) -> None:
        super().__init__(model, blocks=120, seed=seed, block_size=SIZE, kv=kv)
        self.cache.arena.view(torch.float32).fill_(7.0)

    def add(self, tokens: list[int], further: list[int] | None = None) -> int:
        number = super().add(tokens)
        request = Request(str(number), tuple(tokens), Params(max_tokens=100))
        known = [*tokens, *(further or [])]
        self.sequences[number] = Sequence(request, 0, number, known, tables=self.sequences[number].tables)
        return number

    def feed(self, lengths: dict[int, int]) -> dict[int, Tensor]:
        """Compute so many more tokens of each sequence: logits [V] of those of which no more are known."""
        layout, scheduled = self.cache.layout, []
        for number, length in lengths.items():
            sequence = self.sequences[number]
            for table in sequence.tables:
                table += [self.free.pop() for _ in range(-(-(sequence.computed + length) // SIZE) - len(table))]
            scheduled.append((Chunk(number, sequence.computed, length), sequence))
        logits = self.model.logits(self.model.forward(build_batch(scheduled, layout, "cpu"), self.cache))
        ended = [chunk.sequence for chunk, sequence in scheduled if wanted_rows(chunk, sequence)]
        for chunk, sequence in scheduled:
            self._drop(sequence, count_shrinking(chunk, sequence, layout))
            sequence.computed += chunk.length
        return dict(zip(ended, logits, strict=True))

    def _drop(self, sequence: Sequence, blocks: int) -> None:
        for group, table in zip(self.cache.layout.groups, sequence.tables, strict=True):
            for place in range(sequence.dropped, sequence.dropped + (blocks if group.window is None else 0)):
                self.cache.arena[table[place]] = 255
                table[place] = -1
        sequence.dropped += blocks

    def read(self, number: int, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [kv heads, n, D] that a layer has of a sequence, and their bias [kv heads, n] if any."""
        cache, sequence = self.cache.layers[layer], self.sequences[number]
        blocks = torch.tensor(sequence.tables[cache.group][sequence.dropped :])
        count = sequence.computed - sequence.dropped * SIZE
        keys, values = (each[:, :count] for each in read_blocks(cache, blocks))
        bias = None if cache.bias is None else cache.bias[blocks].transpose(0, 1).flatten(1)[:, :count]
        return keys, values, bias


class Recorder(Plain):
    """The plain cache, and what queries there were."""

    def __init__(self) -> None:
        self.queries: dict[int, Tensor] = {}

    def attend(self, step: LayerStep) -> Tensor:
        self.queries[step.layer] = step.queries.clone()
        return super().attend(step)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 3}
    return make_tiny_model(tmp_path_factory.mktemp("models") / "shrinking", **changes)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def model(folder: Path, request: pytest.FixtureRequest) -> Model:
    return load_model(open_checkpoint(str(folder)), choose_kernels("cpu", "cpu"), ModelSettings(request.param))


def make_text(length: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 300) for _ in range(length)]


def feed_prompt(model: Model, kv: str, chunks: tuple[int, ...] = (LENGTH,), seed: int = 0) -> PromptDriver:
    driver = PromptDriver(model, kv, seed)
    number = driver.add(make_text(sum(chunks)))
    for length in chunks:
        driver.feed({number: length})
    return driver


def record(model: Model) -> tuple[PromptDriver, Recorder]:
    """The prompt in a plain cache."""
    driver = PromptDriver(model)
    recorder = driver.cache.policy = Recorder()
    driver.feed({driver.add(make_text(LENGTH)): LENGTH})
    return driver, recorder


def find_attention(model: Model, queries: Tensor, keys: Tensor) -> Matrix:
    """Attention of every query, float64 [kv heads, queries a kv head, S, S]."""
    group = queries.shape[1] // len(keys)
    found = np.zeros((len(keys), group, LENGTH, LENGTH))
    for head in range(queries.shape[1]):
        scores = (queries[:, head].double() @ keys[head // group].double().T) * model.attention[0].scale
        found[head // group, head % group] = scores.masked_fill(
            torch.ones(LENGTH, LENGTH).triu(1) > 0, -torch.inf
        ).softmax(-1)
    return found


def highest(scores: Matrix | list[float], count: int, always: set[int]) -> set[int]:
    """The `always` and the best of the others."""
    ranked = sorted((each for each in range(LENGTH) if each not in always), key=lambda each: (-scores[each], each))
    return always | set(ranked[: count - len(always)])


def keep_streaming(attention: Matrix, count: int) -> list[set[int]]:
    return [{0, 1, 2, 3} | set(range(LENGTH - count + 4, LENGTH))] * len(attention)


def keep_tova(attention: Matrix, count: int) -> list[set[int]]:
    return [highest(attention[:, :, -1].mean((0, 1)), count, {LENGTH - 1})] * len(attention)


def keep_snapkv(attention: Matrix, count: int) -> list[set[int]]:
    found = []
    for head in attention:
        sums = head[:, LENGTH - 20 :].sum((0, 1))[: LENGTH - 20]
        smooth = [sum(sums[max(place - 1, 0) : place + 2]) / 3 for place in range(LENGTH - 20)]
        found.append(highest([*smooth, *[0.0] * 20], count, set(range(LENGTH - 20, LENGTH))))
    return found


def keep_h2o(attention: Matrix, count: int) -> list[set[int]]:
    later = np.arange(LENGTH, 0, -1)
    return [highest(head.sum((0, 1)) / later, count, set()) for head in attention]


def keep_h2o_as_in_the_paper(attention: Matrix, count: int) -> list[set[int]]:
    newest = set(range(LENGTH - count // 2, LENGTH))
    return [highest(head.sum((0, 1)), count, newest) for head in attention]


def keep_scissorhands(attention: Matrix, count: int) -> list[set[int]]:
    found = []
    for head in attention:
        worth = []
        for place in range(LENGTH):
            weights = [(query, head[group, query, place]) for group in range(len(head)) for query in range(110, LENGTH)]
            notable = sum(1 for query, weight in weights if weight * (query + 1) >= 1)
            worth.append(notable + sum(weight for _, weight in weights) / (len(weights) + 1))
        found.append(highest(worth, count, set(range(LENGTH - 5, LENGTH))))
    return found


REFERENCES: dict[str, Callable[[Matrix, int], list[set[int]]]] = {
    "streaming(keep=0.3)": keep_streaming,
    "tova(keep=0.3)": keep_tova,
    "snapkv(keep=60, window=20, kernel=3)": keep_snapkv,
    "h2o(keep=0.3)": keep_h2o,
    "h2o(keep=0.5, recent=0.5, divide=False)": keep_h2o_as_in_the_paper,
    "scissorhands(keep=0.4, history=40, recent=5)": keep_scissorhands,
}


def find_kept(driver: PromptDriver, plain: PromptDriver, layer: int) -> list[list[int]]:
    """Which tokens a layer of a driver's only sequence has kept, by kv head, in the order of their places."""
    keys, values, _ = driver.read(0, layer)
    exact_keys, exact_values, _ = plain.read(0, layer)
    equal = (keys[:, :, None] == exact_keys[:, None]).all(-1) & (values[:, :, None] == exact_values[:, None]).all(-1)
    assert bool((equal.sum(-1) == 1).all())
    return equal.int().argmax(-1).tolist()


@pytest.mark.parametrize("kv", REFERENCES)
def test_the_kept_tokens_are_those_of_brute_force(kv: str, model: Model) -> None:
    driver, (plain, recorder) = feed_prompt(model, kv), record(model)
    dropped = driver.sequences[0].dropped
    assert dropped > 2
    for layer in range(3):
        kept = find_kept(driver, plain, layer)
        attention = find_attention(model, recorder.queries[layer], plain.read(0, layer)[0])
        assert kept == [sorted(each) for each in REFERENCES[kv](attention, LENGTH - dropped * SIZE)]


def test_random_tokens_depend_on_layer_head_seed_and_length_alone(model: Model) -> None:
    plain = record(model)[0]
    kept = [find_kept(feed_prompt(model, kv), plain, layer) for kv in ("random", "random(seed=1)") for layer in (0, 1)]
    for heads in kept:
        assert all(head[:4] == [0, 1, 2, 3] and head == sorted(set(head)) for head in heads)
    assert len({tuple(head) for heads in kept for head in heads}) == 8
    other = PromptDriver(model, "random")
    exact = PromptDriver(model)
    for driver in (other, exact):
        driver.feed({driver.add(make_text(LENGTH, seed=9)): LENGTH})
    assert find_kept(other, exact, 0) == kept[0]


@pytest.mark.parametrize("chunks", [(70, 80), (1, 63, 1, 65, 19, 1), (140, 10), (64, 64, 22)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_keeps_the_same_bits_however_it_is_cut(kind: str, chunks: tuple[int, ...], model: Model) -> None:
    whole, cut = feed_prompt(model, kind), feed_prompt(model, kind, chunks, seed=3)
    assert whole.sequences[0].dropped == cut.sequences[0].dropped > 0
    for layer in range(3):
        for mine, theirs in zip(whole.read(0, layer), cut.read(0, layer), strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_drop_is_the_plain_cache_bit_for_bit(kind: str, model: Model) -> None:
    found = []
    for kv in ("plain", f"{kind}(keep=140)"):
        driver = PromptDriver(model, kv)
        numbers = [driver.add(make_text(length, seed=length), make_text(9)) for length in (1, 30, 155)]
        answers = [driver.feed({0: 1, 1: 30, 2: 60}), driver.feed({0: 9, 1: 9, 2: 95}), driver.feed({2: 9})]
        assert [driver.sequences[number].dropped for number in numbers] == [0, 0, 0]
        found.append([logits for each in answers for logits in each.values()])
    assert len(found[0]) == 3
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_reads_what_was_kept_alone_and_in_company(kind: str, folder: Path) -> None:
    """Against plain torch; the second prompt loses nothing."""
    found = []
    for kernels in ("reference", "cpu"):
        model = load_model(open_checkpoint(str(folder)), choose_kernels(kernels, "cpu"), ModelSettings("fp32"))
        driver = PromptDriver(model, f"{kind}(keep=0.5)")
        for length in (LENGTH, 17, 90):
            driver.add(make_text(length, seed=length), make_text(30, seed=1))
        driver.feed({0: 100, 1: 17})
        driver.feed({0: 50, 1: 9, 2: 90})
        assert [each.dropped for each in driver.sequences] == [4, 0, 2]
        for _ in range(21):
            driver.feed({0: 1, 1: 1, 2: 1})
        found.append(driver.feed({2: 9, 0: 9}))
    alone = PromptDriver(model, f"{kind}(keep=0.5)", seed=5)
    alone.add(make_text(LENGTH, seed=LENGTH), make_text(30, seed=1))
    alone.feed({0: LENGTH})
    assert torch.equal(alone.feed({0: 30})[0], found[1][0])
    for number in (0, 2):
        torch.testing.assert_close(found[0][number], found[1][number], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_sliding_windows_stay_as_they_are(kind: str) -> None:
    _, model = make_pair("Gemma3", GEMMA, choose_kernels("cpu", "cpu"))
    plain, driver = PromptDriver(model), PromptDriver(model, f"{kind}(keep=0.4)")
    for each in (plain, driver):
        each.add([1 + token % 90 for token in make_text(100)], [5] * 20)
        each.feed({0: 100})
    first = driver.cache.layers[0]
    sliding = torch.tensor(driver.sequences[0].tables[first.group])
    assert driver.sequences[0].dropped == 3
    assert torch.equal(read_blocks(first, sliding)[0][:, :100], plain.read(0, 0)[0])
    assert driver.read(0, 1)[0].shape[1] == 52
    assert bool(driver.feed({0: 20})[0].isfinite().all())


def test_a_model_without_full_attention_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to shrink"):
        make_policy("tova").arrange(KVShape((8, 8), 2, 16, torch.float32), SIZE)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [make_text(length, seed=length) for length in (20, 64, 65, 100, 131, 190, 200, 90)]


def open_model(folder: Path, kv: str, **settings: object) -> LLM:
    settings = {"kv_cache_bytes": 2 << 20, "precision": "fp32", "threads": 1, "block_size": SIZE} | settings
    return LLM(str(folder), kv=kv, **settings)  # type: ignore[arg-type]


def answer(llm: LLM, prompts: list[list[int]], length: int = 60) -> list[list[int]]:
    params = SamplingParams(max_tokens=length, ignore_eos=True)
    return [each.outputs[0].token_ids for each in llm.generate(prompts, params, progress=False)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_answer_the_same_in_any_batch_and_after_preemption(
    kind: str, folder: Path, prompts: list[list[int]]
) -> None:
    with open_model(folder, kind) as llm:
        together = answer(llm, prompts)
        assert [answer(llm, [prompt])[0] for prompt in reversed(prompts)] == together[::-1]
        ledger = llm.engine.state.ledger
        room = (ledger.layout.blocks_for(260) + 4) * ledger.layout.block_bytes
    with open_model(
        folder, kind, kv_cache_bytes=room, admission="aggressive", step_tokens=40, max_sequences=8
    ) as crowded:
        assert answer(crowded, prompts) == together
        assert crowded.engine.counters.preemptions > 0
        check_ledger(crowded.engine.state.ledger, [])
        assert crowded.engine.state.ledger.used_blocks == 0


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_freed_when_a_prompt_ends(kind: str, folder: Path) -> None:
    with open_model(folder, f"{kind}(keep=0.25)", step_tokens=96) as llm:
        engine = llm.engine
        engine.add(Request("0", tuple(make_text(192)), Params(max_tokens=20, ignore_eos=True)))
        used = []
        while engine.unfinished:
            engine.step()
            used.append(engine.state.ledger.used_blocks)
            check_ledger(engine.state.ledger, list(engine.state.running))
        groups = len(engine.cache.layout.groups)
    assert used[:3] == [6 * groups, 3 * groups, 4 * groups] and used[-1] == 0


def test_planes_are_counted_and_prefixes_are_not_shared() -> None:
    shape = KVShape((None,) * 4, 2, 16, torch.bfloat16)
    plain = make_policy("plain").arrange(shape, SIZE).block_bytes
    planes = {"streaming": 0, "tova": 1, "h2o": 1, "snapkv": 1, "kvmerger(bias=False)": 1, "kvmerger": 2}
    for kv, count in planes.items():
        layout = make_policy(kv).arrange(shape, SIZE)
        assert layout.block_bytes == plain + 4 * count * 4 * 2 * SIZE
        assert layout.shrink is not None and not layout.shares_prefixes


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ("streaming(keep=1.0)", "keep must be a share below 1 or a whole number"),
        ("tova(keep=0)", "keep must be"),
        ("h2o(keep=True)", "keep must be"),
        ("h2o(divide=3)", "divide must be one of"),
        ("snapkv(kernel=4)", "kernel must be one of"),
        ("snapkv(window=0)", "window must be a whole number from 1"),
        ("scissorhands(recent=-1)", "recent must be"),
        ("streaming(sinks=2.5)", "sinks must be"),
        ("kvmerger(sigma=0)", "sigma must be"),
        ("kvmerger(recent=0.5, heavy=0.3)", "leave no neighbours"),
        ("random(window=3)", "no parameter 'window'"),
    ],
)
def test_wrong_parameters_are_named(kv: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_policy(kv)


def test_where_little_stays_the_first_and_then_the_newest_tokens_do() -> None:
    scores = torch.arange(6.0)[None]
    assert protect(scores, 3, 2, 4).tolist() == [[torch.inf, torch.inf, 2, 3, 4, torch.inf]]
    assert protect(scores, 2, 4, 4).tolist() == [[torch.inf, torch.inf, 2, 3, 4, 5]]


# KVMerger


def make_prompt(length: int = 90, heads: int = 3, seed: int = 0) -> tuple[Tokens, Tensor]:
    """Tokens, and their mass."""
    source = torch.Generator().manual_seed(seed)
    keys = torch.randn(heads, length, 16, generator=source).cumsum(1)
    values = torch.randn(heads, length, 16, generator=source)
    return Tokens(keys, values, torch.ones(heads, length)), torch.rand(heads, length, generator=source)


def join_one_by_one(keys: Tensor, alone: set[int], count: int) -> list[list[int]]:
    """Sets of one head: again and again the two neighbouring tokens that are most alike are joined."""
    unit = keys.double() / keys.double().norm(dim=1, keepdim=True)
    pairs = [each for each in range(len(keys) - 1) if not {each, each + 1} & alone]
    best = sorted(pairs, key=lambda each: -float(unit[each] @ unit[each + 1]))[: len(keys) - count]
    sets = [[0]]
    for token in range(1, len(keys)):
        if token - 1 in best:
            sets[-1].append(token)
        else:
            sets.append([token])
    return sets


@pytest.mark.parametrize("count", [30, 45, 89])
def test_sets_are_consecutive_cover_all_and_leave_the_protected_alone(count: int) -> None:
    prompt, masses = make_prompt()
    kept = KVMerger(sigma=2.0).merge_tokens(prompt, masses, count)
    assert kept.keys.shape == kept.values.shape == (3, count, 16)
    for head in range(3):
        recent, heavy = int(0.34 * count), int(0.24 * count)
        alone = set(range(90 - recent, 90))
        mass = masses[head].tolist()
        alone |= set(sorted(range(90 - recent), key=lambda each: -mass[each])[:heavy])
        sets = join_one_by_one(prompt.keys[head], alone, count)
        assert len(sets) == count and [token for each in sets for token in each] == list(range(90))
        assert all(len(each) == 1 for each in sets if set(each) & alone)
        for place, each in enumerate(sets):
            pivot = max(each, key=lambda token: mass[token])
            gaps = [float((prompt.keys[head, token] - prompt.keys[head, pivot]).square().sum()) for token in each]
            weights = torch.tensor([-gap / 8 for gap in gaps]).exp()
            weights = weights / weights.sum()
            for merged, own in ((kept.keys, prompt.keys), (kept.values, prompt.values)):
                torch.testing.assert_close(merged[head, place], weights @ own[head, each], atol=1e-5, rtol=1e-4)
            assert float(kept.sizes[head, place]) == len(each)
            if len(each) == 1:
                assert torch.equal(kept.keys[head, place], prompt.keys[head, each[0]])


def attend_to(kept: Tokens, queries: Tensor) -> Tensor:
    scores = queries @ kept.keys.transpose(1, 2) + kept.sizes.log()[:, None]
    return scores.softmax(-1) @ kept.values


def test_equal_neighbours_are_merged_without_loss() -> None:
    (tokens, mass), policy = make_prompt(40), KVMerger(recent=0.0, heavy=0.0)
    repeats = torch.arange(40) % 3 + 1
    twins = torch.arange(40).repeat_interleave(repeats)
    queries = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    # The second time what is merged stands for several tokens already.
    for time in (1, 2):
        repeated = Tokens(*(each[:, twins] for each in tokens))
        tokens = policy.merge_tokens(repeated, mass[:, twins], 40)
        assert torch.equal(tokens.sizes, (repeats**time).float().expand(3, -1))
        torch.testing.assert_close(attend_to(tokens, queries), attend_to(repeated, queries), atol=1e-5, rtol=1e-4)


def test_the_pivot_has_the_most_mass_and_is_the_first_of_equals() -> None:
    mass = torch.tensor([[1.0, 3.0, 3.0, 0.0, 2.0, 0.0, 0.0]])
    sets = torch.tensor([[0, 0, 0, 1, 1, 2, 2]])
    assert find_pivots(mass, sets, 3).tolist() == [[1, 4, 5]]


def test_where_too_much_is_protected_it_is_joined_too() -> None:
    keys = make_prompt(20, 1)[0].keys
    sets = join_alike(keys, torch.ones(1, 20, dtype=torch.bool), 7)
    assert sets[0, 0] == 0 and sets[0, -1] == 6 and bool((sets.diff(dim=1) >= 0).all())


def test_merged_tokens_reach_the_cache_with_their_bias(model: Model) -> None:
    driver, (plain, _) = feed_prompt(model, "kvmerger(keep=0.5)"), record(model)
    for layer in range(3):
        keys, _, bias = driver.read(0, layer)
        exact = plain.read(0, layer)[0]
        assert bias is not None and bool((bias >= 0).all()) and float(bias.max()) > 0.5
        torch.testing.assert_close(bias.exp().sum(1), torch.full((2,), float(LENGTH)))
        alone = (keys[:, :, None] == exact[:, None]).all(-1).any(-1)
        assert bool(alone[bias == 0].all())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
