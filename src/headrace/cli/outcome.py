"""How a measuring command ends: its result is printed, in JSON that any program reads, and kept. Knows no command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from headrace.core import HeadraceError
from headrace.job.stop import DISK


class NotKept(HeadraceError):
    """The disk refuses what was measured. Says where, why and what to do."""

    exit_code = DISK


@contextmanager
def keeping(path: Path, save: Callable[[], object]) -> Iterator[str]:
    """Keep a result in a file of the cache folder, and print it in the `with`, which hears where it is kept: in words,
    none where the disk refuses. Raises NotKept in that case, but after the `with`: what took minutes is shown."""
    place, refused = f"kept in {path}", None
    try:
        save()
    except OSError as error:
        place, refused = "", error
    yield place
    if refused is not None:
        raise NotKept(
            f"the result cannot be kept in {path}: {refused.strerror or refused}; "
            f"make room or make {path.parent} writable, then run the same command again"
        ) from refused


def spell_json(values: Any, indent: int | None = None) -> str:
    """Plain values as JSON. What is no number, or not finite, becomes null: JSON has no word for it."""
    return json.dumps(msgspec.json.decode(msgspec.json.encode(values)), indent=indent)
