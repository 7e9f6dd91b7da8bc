"""The flags of commands that take a job's settings: generated from the option classes. Knows no command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.cli.settings import Setting, all_settings

Model = Annotated[str, typer.Option(help="A name from `headrace models`, a model folder, a .gguf file or a hub id.")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16, int8 or int4.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE.toml", help="Settings from a file; flags given here win over it."),
    ],
)


def make_parameter(setting: Setting) -> inspect.Parameter:
    """The command-line parameter of one setting. None means not given: then TOML or the default decides."""
    flag = f"{setting.flag}/--no-{setting.flag[2:]}" if setting.kind == "flag" else setting.flag
    option = typer.Option(
        flag,
        help=f"{setting.meaning} [{setting.default_text}]" if setting.default_text else setting.meaning,
        metavar=setting.metavar or None,
        show_default=False,
        rich_help_panel=setting.group,
    )
    kinds: dict[str, Any] = {"flag": bool | None, "list": list[str] | None}
    hint = Annotated[kinds.get(setting.kind, str | None), option]  # type: ignore[valid-type]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)


def add_settings(command: Callable[..., None], own: Sequence[inspect.Parameter] = ()) -> Callable[..., None]:
    """Give a command over rows a signature for typer to read: input, output, config, its own flags, every setting."""
    source = typer.Argument(metavar="INPUT", help="Rows to answer, or - for standard input.", show_default=False)
    target = typer.Option("--output", "-o", metavar="OUTPUT", help="Where answers go; NAME.out.jsonl if not given.")
    keyword = inspect.Parameter.KEYWORD_ONLY
    common = [
        inspect.Parameter("input", keyword, annotation=Annotated[str, source]),
        inspect.Parameter("output", keyword, default=None, annotation=Annotated[str | None, target]),
        CONFIG,
    ]
    return sign(command, [*common, *own, *map(make_parameter, all_settings())])


def sign(command: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """Give the command these keyword parameters, for typer to read."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def make_flag(name: str, hint: Any, default: Any, *others: str, **option: Any) -> inspect.Parameter:
    """A flag of one command's own, for `add_settings`; `others` are flags that mean the same."""
    annotation = Annotated[hint, typer.Option(f"--{name.replace('_', '-')}", *others, **option)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
