"""What number formats were measured to lose, kept by model in the user's cache folder."""

from __future__ import annotations

import json
from pathlib import Path

from platformdirs import user_cache_path


def losses_path() -> Path:
    return user_cache_path("headrace") / "losses.json"


def load_loss(model_hash: str, precision: str, path: Path | None = None) -> float | None:
    """The share by which this format raised a text's perplexity over bf16's; None where nobody has measured it."""
    try:
        value = json.loads((path or losses_path()).read_text())[model_hash][precision]
        return float(value)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_loss(model_hash: str, precision: str, loss: float, path: Path | None = None) -> None:
    """Keep a measured loss. Raises OSError."""
    path = path or losses_path()
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    known.setdefault(model_hash, {})[precision] = round(loss, 5)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(known, indent=2))
    part.replace(path)
