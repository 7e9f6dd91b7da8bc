"""The documentation: commands name flags and files that exist, Python examples compile, the pile is well formed."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import typer

from headrace.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "headrace"]


def find_flags(words: list[str]) -> set[str]:
    """The flags of the command that these words name."""
    found = typer.main.get_command(app)
    for word in words:
        if word.startswith("-") or not hasattr(found, "commands"):
            break
        assert word in found.commands, f"headrace has no command {word}: {words}"
        found = found.commands[word]
    return {flag for parameter in found.params for flag in [*parameter.opts, *parameter.secondary_opts]} | {"--help"}


def test_pages_show_commands_and_code() -> None:
    assert sum(len(commands(page)) for page in PAGES) >= 10
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path) -> None:
    for command in commands(page):
        known = find_flags(command[1:])
        assert not [word for word in command if word.startswith("-") and word != "-" and word not in known], command
        named = [word for word in command if word.startswith("examples/")]
        assert not [word for word in named if not (ROOT / word).exists()], command
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")
    for text in blocks(page, "json"):
        assert json.loads(text)


def test_pile_has_three_kinds_of_rows() -> None:
    rows = [json.loads(line) for line in (ROOT / "examples" / "pile.jsonl").read_text().splitlines()]
    kinds = Counter(row["custom_id"].split("-")[0] for row in rows)
    assert len(rows) >= 60
    assert len({row["custom_id"] for row in rows}) == len(rows)
    assert sorted(kinds) == ["note", "order", "review"]
    assert {row["url"] for row in rows} == {"/v1/chat/completions"}


def test_reviews_are_a_table() -> None:
    with (ROOT / "examples" / "reviews.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert all(row["id"] and row["text"] and row["stars"].isdigit() for row in rows)
