"""`headrace key`: make a key for the server's users."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrace.core import InputError


def key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whom the key is for; the log says it.")],
    file: Annotated[Path, typer.Option(metavar="FILE.toml", help="Where the keys are; made if missing.")] = Path(
        "keys.toml"
    ),
    requests_per_minute: Annotated[int | None, typer.Option(metavar="N", min=1, help="Most requests a minute.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most tokens a minute, of prompts and outputs.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(metavar="N", min=1, help="Most requests at a time.")] = None,
) -> None:
    """Make a random key, add its hash to a file, and print the key.

    It is printed this once: the file holds its hash only. `headrace serve --api-key-file FILE.toml` admits its owner,
    and a running server sees the new key within a second.

    \b
    Examples:
      headrace key alice
      headrace key nightly --file /etc/headrace/keys.toml --requests-per-minute 60 --concurrency 4
    """
    from headrace.server.keys import Key, add_key

    try:
        token = add_key(file, Key(name, requests_per_minute, tokens_per_minute, concurrency))
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from error
    typer.echo(token)
