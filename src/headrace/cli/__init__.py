"""The command line: `headrace` and all its commands, whose root is in `commands`. Starts without torch."""

from headrace.cli.commands import app
from headrace.cli.entry import main

__all__ = ["app", "main"]
