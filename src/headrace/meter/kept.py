"""Measurements that outlive a process: small JSON files in the user's cache folder, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path


def kept_path(name: str) -> Path:
    return user_cache_path("headrace") / name


def read_kept(path: Path) -> Any:
    """What the file holds, or None where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_kept(path: Path, value: Any) -> None:
    """Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)
