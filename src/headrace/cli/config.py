"""Put together the settings of one run: defaults, then a TOML file, then the command line, the last one winning.

Knows the option classes through `headrace.cli.settings` only; knows no command.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headrace.cli.settings import GROUPS, RUN, all_settings, parse_value
from headrace.core import InputError
from headrace.options import EngineOptions, RunOptions, SamplingOptions


class Settings(NamedTuple):
    """The three option records of a run."""

    engine: EngineOptions
    sampling: SamplingOptions
    run: RunOptions


def read_config(path: Path, groups: Sequence[str] = RUN) -> dict[str, Any]:
    """The settings of some groups in a TOML file: one flat table of names as in Python (`max_tokens = 64`).

    Raises InputError for a file that cannot be read, text that is not TOML, an unknown name or a wrong value.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the settings: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    settings = {setting.name: setting for setting in all_settings(groups)}
    for name in entries:
        if name not in settings:
            near = difflib.get_close_matches(name.replace("-", "_"), settings, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "--help lists the settings"
            raise InputError(f"{path}: unknown setting {name!r}; {hint}")
    return {name: parse_value(settings[name], value, f"{path}: {name}") for name, value in entries.items()}


def resolve(flags: Mapping[str, object], config: Path | None = None) -> Settings:
    """The settings of a run from the flags given (name to raw value) and a TOML file. Raises InputError."""
    return Settings(*fill(RUN, flags, config))


def fill(
    groups: Sequence[str],
    flags: Mapping[str, object],
    config: Path | None,
    defaults: Mapping[str, object] | None = None,
) -> list[Any]:
    """The option records of some groups. `defaults` are a command's own, before the options'. Raises InputError."""
    values = dict(defaults or {}) | (read_config(config, groups) if config else {})
    for setting in all_settings(groups):
        if setting.name in flags:
            values[setting.name] = parse_value(setting, flags[setting.name], setting.flag)
    return [
        GROUPS[group](**{each.name: values[each.name] for each in all_settings((group,)) if each.name in values})
        for group in groups
    ]


def default_output(source: str) -> str:
    """Where the answers go without -o: NAME.out.jsonl in the current folder for an input NAME.anything."""
    if source == "-":
        raise InputError("say where the answers go with -o OUTPUT when the input is standard input")
    return name_output(source)


def name_output(source: str) -> str:
    return f"{Path(source).stem}.out.jsonl"
