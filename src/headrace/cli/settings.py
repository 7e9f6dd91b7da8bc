"""Read the option classes: what settings there are, and how text or TOML becomes their values.

The command line, the TOML file and the settings page of the docs are all generated from what `describe` returns.
This module knows nothing of any command, nor of what a setting does.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from headrace.core import InputError
from headrace.options import EngineOptions, RunOptions, SamplingOptions, ServeOptions

Kind = Literal["text", "whole", "number", "flag", "choice", "size", "list"]

GROUPS: dict[str, type] = {
    "Model": EngineOptions,
    "Sampling": SamplingOptions,
    "Run": RunOptions,
    "Serve": ServeOptions,
}
# What a command takes.
RUN, SERVE = ("Model", "Sampling", "Run"), ("Model", "Sampling", "Serve")

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: a field of an option class, as a flag, a TOML key and a row of the settings page show it."""

    name: str
    group: str
    kind: Kind
    default: Any
    choices: tuple[str, ...]
    meaning: str
    metavar: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def default_text(self) -> str:
        """The default as a person would type it; empty where there is none."""
        if self.kind == "flag":
            return "yes" if self.default else "no"
        if self.kind == "size" and self.default:
            return format_size(self.default)
        return "" if self.default is None or self.default == () else str(self.default)


def describe(options: type, group: str = "") -> tuple[Setting, ...]:
    """The settings of an option class (a dataclass), in its order."""
    hints = typing.get_type_hints(options)
    settings = []
    for field in dataclasses.fields(options):
        kind, choices = read_type(hints[field.name], field.metadata["metavar"])
        metavar = field.metadata["metavar"] or default_metavar(kind, choices)
        settings.append(Setting(field.name, group, kind, field.default, choices, field.metadata["meaning"], metavar))
    return tuple(settings)


def all_settings(groups: Sequence[str] = RUN) -> tuple[Setting, ...]:
    """Every setting of some groups, group after group. Names are unique within a command's groups."""
    return tuple(setting for group in groups for setting in describe(GROUPS[group], group))


def read_type(hint: Any, metavar: str | None) -> tuple[Kind, tuple[str, ...]]:
    """Kind and choices of a field's type. Raises TypeError for a type that has no form on a command line."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if metavar == "SIZE":
        return "size", ()
    if typing.get_origin(hint) is Literal:
        return "choice", typing.get_args(hint)
    kinds: dict[Any, Kind] = {str: "text", int: "whole", float: "number", bool: "flag", tuple[str, ...]: "list"}
    if hint not in kinds:
        raise TypeError(f"a setting of type {hint} cannot be given on a command line")
    return kinds[hint], ()


def default_metavar(kind: Kind, choices: tuple[str, ...]) -> str:
    words = {"text": "TEXT", "whole": "N", "number": "NUMBER", "flag": "", "size": "SIZE", "list": "TEXT"}
    return "|".join(choices) if kind == "choice" else words[kind]


def parse_size(text: str) -> int:
    """Bytes from text such as 4GiB, 1.5GB, 512MB or a plain number, rounded down where a unit leaves a fraction.

    Raises InputError for anything else, as for a fraction of a plain byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise InputError(f"{text!r} is not a size; give bytes or a unit from kB to TB or KiB to TiB, such as 4GiB")
    size, unit = Fraction(match[1]), UNITS[match[2].upper()]
    if unit == 1 and size.denominator != 1:
        raise InputError(f"{text!r} is not a whole number of bytes")
    return int(size * unit)


def format_size(size: int) -> str:
    """Bytes as `parse_size` reads them, in the largest binary unit that leaves a whole number."""
    units = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    return next((f"{size // scale}{unit}" for scale, unit in units if size and size % scale == 0), str(size))


def parse_value(setting: Setting, value: object, source: str) -> Any:
    """A setting's value from command-line text or from TOML. Raises InputError naming `source` and what is right."""
    try:
        return PARSERS[setting.kind](setting, value)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except ValueError:
        wanted = WANTED[setting.kind] or "one of " + ", ".join(setting.choices)
        raise InputError(f"{source}: must be {wanted}, got {value!r}") from None


def as_text(setting: Setting, value: object) -> str:
    if not isinstance(value, str) or (setting.choices and value not in setting.choices):
        raise ValueError
    return value


def as_whole(_: Setting, value: object) -> int:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise ValueError
    return int(value)


def as_number(_: Setting, value: object) -> float:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ValueError
    return float(value)


def as_flag(_: Setting, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def as_size(setting: Setting, value: object) -> int:
    return parse_size(str(as_whole(setting, value)) if isinstance(value, int) else as_text(setting, value))


def as_list(setting: Setting, value: object) -> tuple[str, ...]:
    return tuple(as_text(setting, item) for item in (value if isinstance(value, (list, tuple)) else [value]))


PARSERS = {
    "text": as_text,
    "choice": as_text,
    "whole": as_whole,
    "number": as_number,
    "flag": as_flag,
    "size": as_size,
    "list": as_list,
}
WANTED = {
    "text": "text",
    "choice": "",
    "whole": "a whole number",
    "number": "a number",
    "flag": "true or false",
    "size": "a size such as 4GiB",
    "list": "text or a list of texts",
}
