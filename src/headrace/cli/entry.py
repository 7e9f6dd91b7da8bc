"""`main`: run a command and turn whatever it raises into one line and an exit code.

0 all went well; 1 a run that stopped itself, or a bug; 2 a wrong flag, input or model; 3 a disk that refused;
130 Ctrl-C.
Knows no command.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Sequence

import typer
from typer.exceptions import Abort, TyperException

from headrace.cli.commands import app
from headrace.core import HeadraceError
from headrace.job.stop import print_to_stderr

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `headrace` with these arguments (the process's own if None) and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = typer.main.get_command(app).main(words, prog_name="headrace", standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except BrokenPipeError:
        # The reader of our output has gone (as `| head` does): what is left unprinted must not fail at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except HeadraceError as error:
        return complain(str(error), error.exit_code)
    except TyperException as error:
        return complain(read_typing_error(error), error.exit_code)
    except (KeyboardInterrupt, Abort):
        return INTERRUPTED
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        hint = "" if "--debug" in words else " (`headrace --debug ...` shows where)"
        return complain(f"unexpected {type(error).__name__}: {error}{hint}", 1)


def complain(message: str, code: int) -> int:
    print_to_stderr(f"headrace: error: {message}")
    return code


def read_typing_error(error: TyperException) -> str:
    """One line from typer's error, with the nearest flag or command where one was mistyped."""
    flag = getattr(error, "option_name", None)
    if flag and error.message.startswith("No such option"):
        near = difflib.get_close_matches(flag, getattr(error, "possibilities", None) or [], n=1)
        return f"no such flag: {flag}; " + (f"did you mean {near[0]}?" if near else "--help lists them")
    message = error.format_message().strip()
    return message[:1].lower() + message[1:].rstrip(".")
