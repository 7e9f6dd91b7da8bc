"""How many tokens the server's steps hold: measured, unmeasured, and for batches while clients come and go."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from jobs import engine_options
from step_times import TIMES

from headrace.core import InputError, Request, SamplingParams, Sequence
from headrace.llm import LLM
from headrace.options import ServeOptions
from headrace.server import pace
from headrace.server.pace import CALM_SECONDS, GENTLE_UNMEASURED, UNMEASURED, Pace, read_spent
from headrace.server.patience import Patience, choose_seconds


def test_batches_take_short_steps_until_clients_have_been_gone_for_long(tiny_model: Path) -> None:
    now = [0.0]
    mine = Pace(ServeOptions(short_prefill=99, program_seconds=3.0), clock=lambda: now[0])
    with LLM(**asdict(mine.fit(engine_options(tiny_model)))) as llm:
        mine.take(llm.engine)
        turn = Request("a", (1, 2), SamplingParams(), program="talk")
        assert llm.engine.keep(Sequence(turn, 0, 0, [1, 2])) == 3.0
        assert llm.engine.keep(Sequence(replace(turn, program=""), 0, 0, [1, 2])) == 0.0
        assert llm.engine.state.limits.short_prefill == 99

        def step_tokens(clients: bool) -> int:
            mine.shift(llm.engine, clients)
            return llm.engine.state.limits.step_tokens

        assert step_tokens(clients=False) == UNMEASURED
        assert step_tokens(clients=True) == UNMEASURED
        now[0] = CALM_SECONDS - 0.1
        assert step_tokens(clients=False) == GENTLE_UNMEASURED
        now[0] = CALM_SECONDS
        assert step_tokens(clients=False) == UNMEASURED


def run_clients(llm: LLM, mine: Pace, seconds: float) -> tuple[float, float, float]:
    """Let two clients ask on and on while a batch waits; seconds of all steps, the batch's, the longest step's."""
    engine, total, spent, longest, asked = llm.engine, 0.0, 0.0, 0.0, 0
    engine.add(Request("row", (5, 6), SamplingParams(max_tokens=60, ignore_eos=True, n=8), background=True))
    while total < seconds and engine.state.background:
        while len(engine.state.sequences) - engine.state.background < 2:
            asked += 1
            engine.add(Request(str(asked), (1, 2, asked % 50), SamplingParams(max_tokens=10, ignore_eos=True)))
        mine.shift(engine, clients=True)
        before = read_spent(engine)
        engine.step()
        took, tokens, background = (now - then for now, then in zip(read_spent(engine), before, strict=True))
        total, spent, longest = total + took, spent + took * background / tokens, max(longest, took)
    return total, spent, longest


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_batches_have_their_share_under_clients_who_never_pause(tiny_model: Path, share: float) -> None:
    mine = Pace(ServeOptions(batch_share=share))
    with LLM(**asdict(mine.fit(engine_options(tiny_model)))) as llm:
        mine.take(llm.engine)
        total, spent, longest = run_clients(llm, mine, seconds=1.0)
        assert abs(spent - share * total) <= 2 * longest
        assert (llm.engine.state.background_computed > 0) == (share > 0)


def test_what_batches_had_in_a_pause_counts(tiny_model: Path) -> None:
    mine = Pace(ServeOptions(batch_share=0.1))
    with LLM(**asdict(mine.fit(engine_options(tiny_model)))) as llm:
        mine.take(llm.engine)
        llm.engine.add(Request("pile", (1,) * 4, SamplingParams(max_tokens=60, ignore_eos=True, n=8), background=True))
        while llm.engine.unfinished:
            mine.shift(llm.engine, clients=False)
            llm.engine.step()
        had = read_spent(llm.engine)
        total, spent, _ = run_clients(llm, mine, seconds=5 * min(had.seconds, 0.2))
        assert had.background == had.tokens and total > 0 and spent == 0


def test_a_share_is_at_most_half() -> None:
    for share in (-0.1, 0.6, math.nan):
        with pytest.raises(InputError, match=f"batch_share must be a number from 0 to 0.5, got {share}"):
            ServeOptions(batch_share=share)


def test_measured_steps_keep_to_the_target(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "load_step_time", lambda setting: TIMES)
    options = engine_options(tiny_model, step_tokens=1024)
    for target in (0.02, 0.2, 2.0):
        assert Pace(ServeOptions(itl_target=target)).fit(options).step_tokens == TIMES.most_tokens(target, 1024)


def test_what_is_kept_is_worth_it() -> None:
    gaps = [0.1] * 90 + [30.0] * 10
    assert choose_seconds(gaps, benefit=1.0) == 0.1
    assert choose_seconds(gaps, benefit=0.05) == 0.0
    assert choose_seconds(gaps, benefit=1000.0) == 30.0
    assert choose_seconds([2.0, 2.0], benefit=2.0 * math.e) == pytest.approx(2.0)
    assert choose_seconds([2.0], benefit=1.0) == choose_seconds([], benefit=1.0) == 0.0


def test_patience_is_learned_from_turns() -> None:
    now = [0.0]
    patience = Patience(2.0, learned=True, clock=lambda: now[0])
    turn = Request("a", (1,), SamplingParams(), program="p")
    assert patience.end(turn, reload_seconds=1.0) == 2.0
    for _ in range(150):
        now[0] += 0.25
        patience.note_arrival(turn)
        patience.end(turn, reload_seconds=1.0)
    assert patience.end(turn, reload_seconds=1.0) == pytest.approx(0.25)
    assert patience.end(turn, reload_seconds=0.01) == 0.0
    patience.note_wait(3.0)
    assert patience.end(turn, reload_seconds=0.01) == pytest.approx(0.25)
    patience.note_arrival(replace(turn, owner="another"))
    assert patience.end(replace(turn, program=""), reload_seconds=9.0) == 0.0
