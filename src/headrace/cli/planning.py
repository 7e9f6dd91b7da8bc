"""`headrace plan`: what a job will take, before it runs; `headrace tune`: which settings make it faster here."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import typer

from headrace.cli.config import name_output, resolve
from headrace.cli.flags import AsJson, Model, Precision, make_flag
from headrace.cli.outcome import keeping
from headrace.core import InputError
from headrace.options import DEFAULT_MODEL, EngineOptions

PLAN_FLAGS = (
    make_flag("expect_output", int | None, None, min=1, help="Tokens that a row's output will have, where it is open."),
    make_flag("compare", bool, False, help="Also under each precision, number of threads and KV budget."),
    make_flag("html", Path | None, None, metavar="FILE", help="Draw it: a page that opens without a network."),
)


def plan(
    input: str,
    output: str | None,
    config: Path | None,
    expect_output: int | None,
    compare: bool,
    html: Path | None,
    **flags: object,
) -> None:
    """Say what `headrace run` with the same flags would take: tokens, sharing, memory, time. Loads no weights.

    The run is simulated, step by step, by the scheduler that would run it. Times need `headrace bench steps` once.
    Outputs of unknown length are taken to be as long as they may be, or as --expect-output says.

    \b
    Examples:
      headrace plan batch.jsonl
      headrace plan reviews.csv --prompt 'Good or bad? {{ text }}' --choice good,bad --compare
      headrace plan batch.jsonl --expect-output 80 --price-per-hour 0.12 --html forecast.html
    """
    settings = resolve({name: value for name, value in flags.items() if value is not None}, config)
    from rich.console import Console

    from headrace.job.intake import read_ask
    from headrace.job.planning import plan_job
    from headrace.plan.words import format_comparison, format_forecast

    # Nothing is written: the output's name only tells its form.
    ask = read_ask(input, output or name_output(input), *settings)
    if html is not None:
        from headrace.plan.page import draw_forecast

        if not html.parent.is_dir():
            raise InputError(f"{html} cannot be written: {html.parent} does not exist")
    with Console(stderr=True).status("reading") as status:
        values = plan_job(ask, expect_output, compare, status.update)
    if ask.run.json:
        typer.echo(json.dumps(values))
    else:
        typer.echo(format_forecast(values))
        if compare:
            typer.echo("\n" + format_comparison(values["compared"]))
    if html is not None:
        write_page(html, draw_forecast(values))


def tune(
    model: Model = DEFAULT_MODEL,
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Find the settings that run fastest on this machine, and keep them for this model.

    Tokens a step, sequences, block size, threads: many by simulation (`headrace bench steps` must have been run), the
    best by short runs in turn, some three minutes for 135 million parameters. Runs then use what was found wherever
    these settings have their defaults, given or not (--no-tuned: nowhere). No result changes by it.

    \b
    Example:
      headrace tune --model smollm2-135m --precision int8
    """
    from rich.console import Console

    from headrace.checkpoint import open_checkpoint
    from headrace.engine.loading import resolve_options
    from headrace.engine.tuned import save_tuned, tuned_path
    from headrace.meter.step_time import spell_command
    from headrace.plan.tuning import describe_changes
    from headrace.plan.tuning import tune as search

    options = EngineOptions(model=model, precision=precision)  # type: ignore[arg-type]
    checkpoint = open_checkpoint(model)
    resolved = resolve_options(options, checkpoint)
    with Console(stderr=True).status("tuning") as status:
        found = search(options, checkpoint, status.update)
    save = partial(save_tuned, checkpoint.hash(), resolved.machine, resolved.precision, found.kept)
    with keeping(tuned_path(), save) as kept:
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(found)))
            return
        for trial in found.trials:
            typer.echo(f"{trial.seconds:7.2f} s  {describe_changes(trial.changes)}")
        typer.echo(f"{kept or 'not kept'}: {describe_changes(found.kept)}")
    if {"block_size", "threads"} & set(found.kept):
        typer.echo(f"what steps take has changed by it: run `{spell_command(options)}` again for forecasts")


def write_page(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
