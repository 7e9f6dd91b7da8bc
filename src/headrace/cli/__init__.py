"""The command line: `headrace run`, `report`, `pull`, `models`, `bench`, `eval`. Starts without torch."""

from headrace.cli.commands import app
from headrace.cli.entry import main

__all__ = ["app", "main"]
