"""What number formats were measured to lose, kept by model in the user's cache folder."""

from __future__ import annotations

from pathlib import Path

from headrace.meter.kept import kept_path, read_kept, write_kept


def losses_path() -> Path:
    return kept_path("losses.json")


def load_loss(model_hash: str, precision: str, path: Path | None = None) -> float | None:
    """The share by which this format raised a text's perplexity over bf16's; None where nobody has measured it."""
    try:
        return float(read_kept(path or losses_path())[model_hash][precision])
    except (ValueError, KeyError, TypeError):
        return None


def save_loss(model_hash: str, precision: str, loss: float, path: Path | None = None) -> None:
    """Keep a measured loss. Raises OSError."""
    path = path or losses_path()
    known = read_kept(path) or {}
    known.setdefault(model_hash, {})[precision] = round(loss, 5)
    write_kept(path, known)
