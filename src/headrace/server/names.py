"""The names by which clients call models. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def name_served(model: str) -> str:
    """The name of a model: a path's last part."""
    path = Path(model)
    return (path.stem if path.suffix == ".gguf" else path.name) if path.exists() else model


def find_name(asked: str, names: Iterable[str]) -> str | None:
    """Which of the names is meant, however a KV policy in it is spaced; None if none is."""
    squeezed = "".join(asked.split())
    return next((name for name in names if "".join(name.split()) == squeezed), None)
