"""What a run will take, said before its first step: the rows that wait in the engine, simulated."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from headrace.job.feed import Feed
from headrace.job.pile import Expectation, make_pile
from headrace.llm import LLM
from headrace.meter.peaks import describe_machine
from headrace.meter.step_time import describe_setting, load_step_time, spell_command
from headrace.plan.forecast import forecast
from headrace.plan.simulator import Memory

# More would keep a large job from starting; what is left is taken to go on alike.
MOST_STEPS = 1500
TOKENS = ("prompt_tokens", "output_tokens", "optimum_tokens", "arrival_tokens", "planned_tokens")
SCALED = ("requests", "seconds", "energy_j", "steps", "preemptions", "windows", *TOKENS)


def foresee(llm: LLM, feed: Feed, rows: int, elapsed: float) -> dict[str, Any]:
    """The forecast of `rows` rows, from those that the feed has brought to the engine so far. `seconds` counts the
    `elapsed` ones.

    Without step times of this machine `seconds` is None, and there is only `measure`, the command that measures them.
    """
    engine = llm.engine
    machine = describe_machine(llm.resolved["instruction_set"])
    step_time = load_step_time(describe_setting(llm.model_hash, machine, llm.resolved))
    if step_time is None:
        return {"seconds": None, "measure": spell_command(llm.options)}
    requests = {sequence.request.id: sequence.request for sequence in engine.state.waiting}
    pile = make_pile(requests.values(), Expectation(llm.tokenizer))
    memory = Memory.of_engine(engine)
    found = asdict(forecast(pile.tasks, llm.options, memory, step_time, pile.outputs_known, MOST_STEPS))
    del found["timeline"]
    scale = 1.0 if feed.exhausted else max(1.0, rows / max(1, feed.flow.rows))
    for name in SCALED:
        found[name] = None if found[name] is None else found[name] * scale
    # What has passed does not come again, as the choice of a KV cache. To read the rest takes little beside its steps.
    found["seconds"] += elapsed
    return found | {"rows": rows, "rows_seen": feed.flow.rows}
