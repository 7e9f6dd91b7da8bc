"""How commands, and groups of them, print their help. Knows no command."""

from __future__ import annotations

from typing import Any

import typer


class GroupedCommand(typer.core.TyperCommand):
    """A command whose help lists its flags in groups, as plain text that a pipe or a narrow terminal keeps whole."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                group = getattr(parameter, "rich_help_panel", None) or "Files and help"
                groups.setdefault(group, []).append((record[0].removesuffix(" <str>"), record[1]))
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


class HelpfulGroup(typer.core.TyperGroup):
    """Commands of one name. The name alone prints their help, as `headrace` alone does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])
