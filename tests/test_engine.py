"""The engine on a tiny real model: what a row says never depends on what else runs."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_model

from headrace import LLM, Constraint, RequestOutput, SamplingParams
from headrace.cache.checks import check_ledger
from headrace.core import InputError, Request, RowError
from headrace.engine.structure import CACHED_GRAMMARS, HARMLESS_CHARACTERS, ConstraintCompiler


def open_model(folder: Path, **options: Any) -> LLM:
    settings = {"precision": "fp32", "block_size": 16, "kv_cache_bytes": 8 << 20, "threads": 1} | options
    return LLM(str(folder), **settings)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with open_model(tiny_model) as opened:
        yield opened


@pytest.fixture(scope="module")
def windowed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "windowed"
    return make_tiny_model(folder, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=24)


def make_prompts(count: int, seed: int = 0, longest: int = 90) -> list[list[int]]:
    """Random prompts, a third of them with one of two shared beginnings."""
    source = random.Random(seed)
    shared = [[source.randrange(3, 300) for _ in range(40)] for _ in range(2)]
    prompts = []
    for index in range(count):
        own = [source.randrange(3, 300) for _ in range(source.randrange(1, longest))]
        prompts.append(shared[index % 2] + own if index % 3 == 0 else own)
    return prompts


def answers(outputs: list[RequestOutput]) -> list[list[tuple[list[int], str, str | None]]]:
    return [[(each.token_ids, each.text, each.finish_reason) for each in output.outputs] for output in outputs]


def mixed_params(count: int) -> list[SamplingParams]:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9},
        {"temperature": 1.0, "top_p": 0.9, "n": 3},
        {"temperature": 0.7, "top_k": 8, "presence_penalty": 0.4},
        {"ignore_eos": True, "repetition_penalty": 1.2},
    ]
    return [SamplingParams(max_tokens=8 + index % 23, **kinds[index % len(kinds)]) for index in range(count)]


@pytest.mark.parametrize("family", ["tiny_model", "windowed_model"])
def test_alone_together_shuffled_chunked_preempted_all_say_the_same(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    prompts, params = make_prompts(24), mixed_params(24)
    with open_model(folder) as plain:
        together = answers(plain.generate(prompts, params))
        again = answers(plain.generate(prompts, params))
    assert together == again
    with open_model(folder, prefix_cache=False, max_sequences=1) as one:
        assert answers(one.generate(prompts, params)) == together
    for step_tokens in (16, 33):
        with open_model(folder, step_tokens=step_tokens) as chunked:
            assert answers(chunked.generate(prompts, params)) == together
    block = 2 * 2 * 2 * 16 * 16 * 4
    with open_model(folder, kv_cache_bytes=12 * block, max_sequences=24) as crowded:
        assert answers(crowded.generate(prompts, params)) == together
        assert crowded.engine.counters.kv_peak_bytes <= 12 * block
    with open_model(folder) as shuffled:
        order = list(range(24))
        random.Random(3).shuffle(order)
        for place in order:
            greedy = params[place].greedy
            output = shuffled.generate([prompts[place]], params[place])
            assert not greedy or answers(output)[0] == together[place]


def test_preemption_happens_and_changes_nothing(tiny_model: Path, llm: LLM) -> None:
    """Lengths far above what the forecast has seen: it guesses wrong, and recomputation mends it."""
    block = 2 * 2 * 2 * 16 * 16 * 4
    short = SamplingParams(max_tokens=200, stop_token_ids=tuple(range(300)))
    long = SamplingParams(max_tokens=200, ignore_eos=False, min_tokens=190)
    prompts = make_prompts(20, seed=5, longest=30)
    expected = answers(llm.generate(prompts, long))
    with open_model(tiny_model, kv_cache_bytes=40 * block) as crowded:
        crowded.generate(make_prompts(64, seed=6, longest=20), short)
        assert answers(crowded.generate(prompts, long)) == expected
        counters = crowded.engine.counters
        assert counters.preemptions > 0 and counters.recomputed_tokens > 0
        assert counters.prompt_tokens == counters.cached_prompt_tokens + counters.computed_prompt_tokens


def test_equal_prefixes_are_computed_once(tiny_model: Path) -> None:
    prefix = [7 + index % 50 for index in range(320)]
    prompts = [[*prefix, 100 + index, 7, 8] for index in range(16)]
    with open_model(tiny_model) as fresh:
        fresh.generate(prompts, SamplingParams(max_tokens=4))
        counters = fresh.engine.counters
    assert counters.computed_prompt_tokens == 320 + 16 * 3
    assert counters.cached_prompt_tokens == 15 * 320


def test_n_shares_one_prefill_and_choices_differ(llm: LLM) -> None:
    before = llm.engine.counters.computed_prompt_tokens
    prompt = [9 + index % 61 for index in range(160)]
    (output,) = llm.generate([prompt], SamplingParams(n=4, temperature=1.0, max_tokens=12))
    assert llm.engine.counters.computed_prompt_tokens - before == 160 + 3 * 16
    assert [each.index for each in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(each.token_ids) for each in output.outputs}) == 4


def test_the_pool_is_as_it_began(tiny_model: Path) -> None:
    with open_model(tiny_model, prefix_cache=False) as fresh:
        fresh.generate(make_prompts(30), mixed_params(30))
        state = fresh.engine.state
        assert fresh.engine.unfinished == 0 and not state.waiting and not state.running
        assert state.ledger.used_blocks == 0 and state.ledger.free_blocks == state.ledger.num_blocks


def test_leaving_a_stream_early_frees_its_work(llm: LLM) -> None:
    stream = llm.stream(make_prompts(20), SamplingParams(max_tokens=20))
    next(stream)
    with pytest.raises(ValueError, match="unfinished"):
        llm.generate("x")
    stream.close()  # type: ignore[attr-defined]
    assert llm.engine.unfinished == 0 and llm.engine.state.ledger.used_blocks == 0
    assert len(llm.generate("x", SamplingParams(max_tokens=2))[0].outputs[0].token_ids) <= 2


def test_what_waits_and_what_runs_is_aborted_at_once_and_the_rest_goes_on(llm: LLM) -> None:
    engine, params = llm.engine, SamplingParams(max_tokens=12, ignore_eos=True, n=2)
    prompts = make_prompts(300)
    (alone,) = llm.generate([prompts[7]], params)
    for place, prompt in enumerate(prompts):
        engine.add(Request(str(place), prompt, params))
    for _ in range(3):
        engine.step()
    assert engine.state.running and engine.waiting
    engine.abort_all([*(str(place) for place in range(300) if place != 7), "nobody's"])
    assert engine.unfinished == 1 and len(engine.state.sequences) == 2
    outputs = []
    while engine.unfinished:
        outputs += engine.step()
    assert [each.token_ids for each in outputs[0].outputs] == [each.token_ids for each in alone.outputs]
    check_ledger(engine.state.ledger, [])


def test_stop_strings_across_token_borders(llm: LLM) -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    (plain,) = llm.generate(["The wheel"], params)
    text = plain.outputs[0].text
    stop = text[10:14]
    where = text.index(stop)
    (cut,) = llm.generate(["The wheel"], SamplingParams(max_tokens=60, ignore_eos=True, stop=(stop,)))
    assert cut.outputs[0].text == text[:where]
    assert cut.outputs[0].finish_reason == "stop" and cut.outputs[0].stop_reason == stop
    included = SamplingParams(max_tokens=60, ignore_eos=True, stop=(stop,), include_stop_str_in_output=True)
    assert llm.generate(["The wheel"], included)[0].outputs[0].text == text[: where + len(stop)]
    assert len(cut.outputs[0].token_ids) < 60


def test_stop_token_ids_end_the_row_and_stay_out_of_the_text(llm: LLM) -> None:
    (plain,) = llm.generate(["water"], SamplingParams(max_tokens=20, ignore_eos=True))
    token = plain.outputs[0].token_ids[5]
    first = plain.outputs[0].token_ids.index(token)
    (cut,) = llm.generate(["water"], SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=(token,)))
    assert cut.outputs[0].token_ids == plain.outputs[0].token_ids[: first + 1]
    assert cut.outputs[0].text == llm.tokenizer.decode(plain.outputs[0].token_ids[:first])
    assert cut.outputs[0].stop_reason == token


@pytest.mark.parametrize(
    ("constraint", "check"),
    [
        (Constraint("choice", '["yes", "no", "perhaps so"]'), lambda text: text in ("yes", "no", "perhaps so")),
        (Constraint("regex", "[0-9]{3}-[a-f]{2}"), lambda text: len(text) == 6 and text[3] == "-"),
        (
            Constraint(
                "json",
                '{"type":"object","properties":{"a":{"type":"boolean"}},"required":["a"],"additionalProperties":false}',
            ),
            lambda text: text in ('{"a":true}', '{"a":false}', '{"a": true}', '{"a": false}'),
        ),
    ],
)
def test_constraints_hold_greedy_and_random(llm: LLM, constraint: Constraint, check: Any) -> None:
    settings = [SamplingParams(max_tokens=40, constraint=constraint, temperature=t) for t in (0.0, 1.0, 2.0)]
    for output in llm.generate(["Answer: "] * 3, settings):
        assert output.outputs[0].finish_reason == "stop"
        assert check(output.outputs[0].text), output.outputs[0].text


def test_impossible_rows_say_why_and_the_others_go_on(llm: LLM) -> None:
    prompts: list[Any] = ["fine", [5] * 2000, [10**6], [], "also fine"]
    bad = SamplingParams(constraint=Constraint("regex", "(unclosed"))
    outputs = llm.generate(prompts, [SamplingParams(max_tokens=3)] * 4 + [bad])
    codes = [output.error.code if output.error else None for output in outputs]
    assert codes == [None, "context_length", "token_range", "empty_prompt", "constraint"]
    assert len(outputs[0].outputs[0].token_ids) <= 3


def test_a_refusal_is_remembered_as_a_grammar_is(llm: LLM) -> None:
    """A long text is tried in a process of its own, which shows in the page faults of children."""
    compiler = ConstraintCompiler(llm.tokenizer, llm.tokenizer.size)
    long = Constraint("regex", "(" + "a" * HARMLESS_CHARACTERS)
    others = [Constraint("regex", f"({number}") for number in range(CACHED_GRAMMARS)]
    faults = [resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt]
    for constraint in (long, long, *others, long):
        with pytest.raises(RowError, match="unclosed group"):
            compiler.open_matcher(constraint)
        faults.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt)
        assert not compiler.is_slow(constraint)
    assert faults[0] < faults[1] == faults[-2] < faults[-1]


def test_more_kv_memory_than_there_can_be_is_refused_in_words(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"no [\d,]+ bytes for the KV cache: lower kv_cache_bytes"):
        open_model(tiny_model, kv_cache_bytes=1 << 60)
    with pytest.raises(InputError, match="kv_memory_share must be a number from 0 to 1, got 5"):
        open_model(tiny_model, kv_memory_share=5)


def test_a_request_larger_than_the_cache_is_refused(tiny_model: Path) -> None:
    block = 2 * 2 * 2 * 16 * 16 * 4
    with open_model(tiny_model, kv_cache_bytes=4 * block) as small:
        output = small.generate([[5] * 60], SamplingParams(max_tokens=40))[0]
        assert output.error is not None and output.error.code == "kv_memory"
        assert small.generate([[5] * 30], SamplingParams(max_tokens=20))[0].error is None


def test_a_long_prompt_never_stops_the_others(tiny_model: Path) -> None:
    from headrace.core import Request

    with open_model(tiny_model, step_tokens=32) as busy:
        engine = busy.engine
        talkers = [
            Request(f"talk{index}", (5 + index, 6), SamplingParams(max_tokens=60, ignore_eos=True))
            for index in range(4)
        ]
        for each in talkers:
            engine.add(each)
        engine.step()
        engine.add(Request("long", tuple(5 + index % 90 for index in range(900)), SamplingParams(max_tokens=1)))
        for _ in range(20):
            before = {sequence.number: len(sequence.tokens) for sequence in engine.state.running}
            engine.step()
            for sequence in engine.state.running:
                if sequence.request.id != "long":
                    assert len(sequence.tokens) == before[sequence.number] + 1


def test_scoring_matches_the_logprobs_of_generation(llm: LLM) -> None:
    (generated,) = llm.generate(["The wheel turns"], SamplingParams(max_tokens=12, logprobs=0, ignore_eos=True))
    tokens = generated.prompt_token_ids + generated.outputs[0].token_ids
    (scored,) = llm.score([tokens])
    tail = scored.logprobs[len(generated.prompt_token_ids) :]
    assert generated.outputs[0].logprobs is not None
    assert tail == pytest.approx([entry.logprob for entry in generated.outputs[0].logprobs], abs=1e-5)
    assert scored.logprobs[0] is None and scored.perplexity > 1


def test_a_closed_model_says_so(tiny_model: Path) -> None:
    with open_model(tiny_model) as short_lived:
        stream = short_lived.stream(["a"], SamplingParams(max_tokens=2))
        with pytest.raises(ValueError, match="unfinished"):
            next(stream) and short_lived.score("a")
    with pytest.raises(ValueError, match="this LLM is closed"):
        short_lived.generate("a")


def test_wrong_arguments_say_what_would_be_right(llm: LLM, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="LLM has no setting 'gpu'"):
        LLM(str(tiny_model), gpu=True)
    with pytest.raises(ValueError, match="precision must be one of auto, fp32, bf16"):
        LLM(str(tiny_model), precision="fp64")
    with pytest.raises(ValueError, match="one a prompt: got 2 for 1"):
        llm.generate(["a"], [SamplingParams(), SamplingParams()])
    with pytest.raises(ValueError, match="temperature must be a number from 0"):
        SamplingParams(temperature=-1)
    with pytest.raises(ValueError, match="prompts must be a text"):
        llm.generate(17)  # type: ignore[arg-type]
