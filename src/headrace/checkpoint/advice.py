"""How a model's makers would have it sampled, by the file they put beside it. Knows no engine."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "generation_config.json"
NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_advice(path: Path) -> dict[str, float]:
    """Parameters of sampling for the model in this folder or file; none where it advises nothing, or not to sample."""
    try:
        settings = json.loads((path / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(settings, dict) or settings.get("do_sample") is not True:
        return {}
    found = {name: settings.get(name) for name in NAMES}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}
