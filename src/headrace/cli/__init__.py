"""The command line: `headrace run`, `pull`, `models`. Starts without torch; a command loads what it needs."""

from headrace.cli.commands import app
from headrace.cli.entry import main

__all__ = ["app", "main"]
