"""How many tokens the server's steps hold: measured, unmeasured, and for batches while clients come and go."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from jobs import engine_options
from step_times import TIMES

from headrace.llm import LLM
from headrace.options import ServeOptions
from headrace.server import pace
from headrace.server.pace import CALM_SECONDS, GENTLE_UNMEASURED, UNMEASURED, Pace


def test_batches_take_short_steps_until_clients_have_been_gone_for_long(tiny_model: Path) -> None:
    now = [0.0]
    mine = Pace(ServeOptions(short_prefill=99, program_seconds=3.0), clock=lambda: now[0])
    with LLM(**asdict(mine.fit(engine_options(tiny_model)))) as llm:
        mine.take(llm.engine)
        assert llm.engine.keep_seconds == 3.0 and llm.engine.state.limits.short_prefill == 99

        def step_tokens(clients: bool) -> int:
            mine.shift(llm.engine, clients)
            return llm.engine.state.limits.step_tokens

        assert step_tokens(clients=False) == UNMEASURED
        assert step_tokens(clients=True) == UNMEASURED
        now[0] = CALM_SECONDS - 0.1
        assert step_tokens(clients=False) == GENTLE_UNMEASURED
        now[0] = CALM_SECONDS
        assert step_tokens(clients=False) == UNMEASURED


def test_measured_steps_keep_to_the_target(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "load_step_time", lambda setting: TIMES)
    options = engine_options(tiny_model, step_tokens=1024)
    for target in (0.02, 0.2, 2.0):
        assert Pace(ServeOptions(itl_target=target)).fit(options).step_tokens == TIMES.most_tokens(target, 1024)
