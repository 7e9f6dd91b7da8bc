"""SHA-256 of large files, remembered in the cache folder by path, size and time of change. Knows nothing of models."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from platformdirs import user_cache_path

from headrace.core import ModelError


def cache_folder() -> Path:
    """Headrace's folder in the user's cache; not made here."""
    return user_cache_path("headrace")


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the contents of the files, end to end in the order given, as hexadecimal digits.

    Read once: the result is remembered until one of the files changes. Raises ModelError if one cannot be read.
    """
    try:
        key = describe_files(paths)
        known = load_hashes().get(key)
        if known is not None:
            return known
        total = hashlib.sha256()
        for path in paths:
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    total.update(piece)
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read: {error.strerror}") from error
    remember_hash(key, total.hexdigest())
    return total.hexdigest()


def describe_files(paths: Sequence[Path]) -> str:
    """What makes these files the same ones as last time."""
    status = [(path.resolve(), path.stat()) for path in paths]
    return "|".join(f"{path}:{stat.st_size}:{stat.st_mtime_ns}" for path, stat in status)


def load_hashes() -> dict[str, str]:
    """The remembered hashes; none if there are none or the file is damaged, for they can be computed again."""
    try:
        found = json.loads((cache_folder() / "hashes.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remember_hash(key: str, value: str) -> None:
    """Add one hash to the remembered ones. A cache that cannot be written costs time later, so that is no error."""
    with contextlib.suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump(load_hashes() | {key: value}, file)
        os.replace(file.name, folder / "hashes.json")
