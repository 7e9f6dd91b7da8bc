"""What a job would take: its rows as a pile, simulated under its settings and under others, no weight loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from headrace.cache.policies.choice import COMPARED
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.core import InputError
from headrace.job.intake import STDIN, Ask, open_rows
from headrace.job.pile import Expectation, Pile, read_pile
from headrace.meter.peaks import count_cores
from headrace.meter.report import format_share
from headrace.meter.step_time import spell_command
from headrace.plan.forecast import forecast
from headrace.plan.site import Site, open_site
from headrace.quant import FORMATS

# Of simulation; a step takes about a thousandth of a second of it.
MOST_STEPS = 40_000
SHOWN = ("precision", "threads", "schedule", "step_tokens", "max_sequences", "block_size")

Tell = Callable[[str], None]


def plan_job(ask: Ask, expected: int | None, compare: bool, tell: Tell) -> dict[str, Any]:
    """Read the whole input and forecast it; with `compare`, also under other settings.

    Raises InputError for what `headrace run` would refuse as a whole.
    """
    if ask.source == STDIN:
        raise InputError("a plan reads its rows from a file: name one instead of -")
    checkpoint = open_checkpoint(ask.engine.model)
    site = open_site(ask.engine, checkpoint)
    source, batch, rows = open_rows(ask, Path(ask.source))
    tokenizer = checkpoint.tokenizer()
    pile = read_pile(
        source.rows(),
        ask.make_drafter(batch, tokenizer),
        tokenizer,
        site.memory.context_length,
        Expectation(tokenizer, expected),
        lambda done: tell(f"{done:,} of {rows:,} rows read"),
    )
    if not pile.tasks:
        raise InputError(f"{ask.source}: none of its {pile.rows:,} rows can be answered")
    tell("simulating")
    values = {
        "input": ask.source,
        "rows": pile.rows,
        "equal": pile.equal,
        "failed": pile.failed,
        **foresee(site, pile, ask.run.price_per_hour),
        "settings": {name: site.settings[name] for name in SHOWN},
        "precision_reason": site.resolved.precision_reason,
        "kv_reason": explain_kv(ask.kv_loss) if ask.kv_loss else None,
    }
    if compare:
        values["compared"] = list(compare_settings(ask, site, checkpoint, pile, tell))
    return values


def explain_kv(budget: float) -> str:
    """What a forecast says of --kv-loss: to know which cache that is takes the model itself."""
    return f"the full cache is foreseen: the run measures first which smaller one loses at most {format_share(budget)}"


def foresee(site: Site, pile: Pile, price: float | None) -> dict[str, Any]:
    """A pile's forecast as plain values, with its price where one an hour is given. `measure`: the command without
    which there is no time, None where there is one."""
    found = forecast(pile.tasks, site.options, site.memory, site.step_time, pile.outputs_known, MOST_STEPS)
    cost = None if price is None or found.seconds is None else price * found.seconds / 3600
    return asdict(found) | {"cost": cost, "measure": spell_command(site.options) if site.step_time is None else None}


def compare_settings(ask: Ask, site: Site, checkpoint: Checkpoint, pile: Pile, tell: Tell) -> Iterator[dict[str, Any]]:
    """Forecasts under each precision, number of threads, and KV budget; `impossible` says why one cannot be had."""
    for name, change in list_changes(site):
        tell(f"simulating {name}")
        try:
            other = open_site(replace(ask.engine, **change), checkpoint)
        except InputError as error:
            yield {"name": name, "impossible": str(error)}
            continue
        values = foresee(other, pile, ask.run.price_per_hour)
        del values["timeline"]
        yield {"name": name, "impossible": None, **values}


def list_changes(site: Site) -> Iterator[tuple[str, dict[str, Any]]]:
    for precision in FORMATS:
        yield f"precision {precision}", {"precision": precision}
    for threads in list_threads(count_cores()):
        yield f"threads {threads}", {"precision": site.resolved.precision, "threads": threads}
    budget = site.memory.num_blocks * site.memory.layout.block_bytes
    for kv in COMPARED:
        yield f"KV {kv}", {"precision": site.resolved.precision, "kv": kv}
    for parts in (4, 16):
        yield f"KV memory / {parts}", {"precision": site.resolved.precision, "kv_cache_bytes": max(1, budget // parts)}


def list_threads(cores: int) -> list[int]:
    """Numbers of threads worth a look: powers of two, and as many as there are cores."""
    return sorted({cores, *(2**power for power in range(cores.bit_length()))})
