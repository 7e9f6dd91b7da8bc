"""The command line's root, where every command has its name; `headrace run`, `pull` and `models` are written here.

Flags in, calls to the other rooms out. The flags of `run` are generated from the option classes. Rooms that load torch
are imported inside the command that needs them, so that help and typing errors answer at once.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Annotated

import typer

from headrace import __version__
from headrace.cli.chatting import chat
from headrace.cli.config import default_output, resolve
from headrace.cli.flags import CONFIG, add_settings, sign
from headrace.cli.grouped import GroupedCommand
from headrace.cli.judging import CONTEXTS_FLAGS, KV_FLAGS, eval_contexts, eval_kv
from headrace.cli.keys import key
from headrace.cli.measuring import bench, judge, quantize, report
from headrace.cli.planning import PLAN_FLAGS, plan, tune
from headrace.cli.serving import FLAGS as SERVE_FLAGS
from headrace.cli.serving import serve

app = typer.Typer(
    name="headrace",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headrace {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an unexpected error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run a pile of prompts through a language model on the machine you have; lose nothing, repeat nothing.

    Try it: `headrace run prompts.jsonl -o answers.jsonl`. The first run fetches a small model.
    """


def run(input: str, output: str | None, config: Path | None, **flags: object) -> None:
    """Answer every row of INPUT and write OUTPUT.

    INPUT is an OpenAI Batch file (.jsonl), or a table (.jsonl, .csv, .parquet) with --prompt. - is standard input.
    OUTPUT keeps the rows' order; its suffix chooses its form: .jsonl, .csv or .parquet. A run that was stopped goes
    on where it was when the same command is given again.

    \b
    Examples:
      headrace run batch.jsonl -o answers.jsonl
      headrace run reviews.csv --prompt 'Good or bad? {{ text }}' --choice good,bad -o out.csv
      headrace run notes.parquet --prompt-file ask.txt --json-schema fields.json --expand -o out.parquet
    """
    settings = resolve({name: value for name, value in flags.items() if value is not None}, config)
    target = output or default_output(input)
    from headrace.job.run import run_job

    # What is loaded by now stays until the process ends: the collector need not look at it again and again.
    gc.freeze()
    run_job(input, target, *settings)


app.command(cls=GroupedCommand)(add_settings(run))
app.command(cls=GroupedCommand)(add_settings(plan, PLAN_FLAGS))
app.command(cls=GroupedCommand)(tune)
app.command(cls=GroupedCommand)(sign(serve, [CONFIG, *SERVE_FLAGS]))
app.command(cls=GroupedCommand)(chat)
app.command(cls=GroupedCommand)(key)
app.command(cls=GroupedCommand)(report)
app.command(cls=GroupedCommand)(quantize)
judge.command("kv", cls=GroupedCommand)(sign(eval_kv, KV_FLAGS))
judge.command("contexts", cls=GroupedCommand)(sign(eval_contexts, CONTEXTS_FLAGS))
app.add_typer(bench, name="bench")
app.add_typer(judge, name="eval")


@app.command(cls=GroupedCommand)
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `headrace models`.", show_default=False)],
) -> None:
    """Fetch a known model, after showing its licence.

    It is kept in the user's cache folder; its SHA-256 is checked.

    \b
    Example:
      headrace pull smollm2-135m
    """
    from headrace.checkpoint.sources import pull as fetch

    typer.echo(fetch(name))


@app.command(cls=GroupedCommand)
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List the known models and what is here.

    Shows each one's name, size, family, context, format, and whether it has been fetched.

    \b
    Example:
      headrace models --json
    """
    from headrace.checkpoint.sources import list_models

    rows = [dataclasses.asdict(listing) | {"path": str(listing.path)} for listing in list_models()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = [("name", "size", "family", "context", "format", "here")]
    for row in rows:
        size, here = f"{row['bytes'] / 1e6:.0f} MB", "yes" if row["present"] else "no, `headrace pull` fetches it"
        table.append((row["name"], size, row["family"], str(row["context"]), row["format"], here))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
