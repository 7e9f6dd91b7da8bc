"""How a model makes one vector of a text, by its own configuration. Knows nothing of hidden states."""

from __future__ import annotations

import json
from pathlib import Path

from headrace.core import ModelError, Pooling

# Where sentence-transformers keeps it, and its names for what there is.
PLACE = Path("1_Pooling", "config.json")
KINDS: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}


def read_pooling(path: Path) -> Pooling:
    """The pooling of the model in this folder or file; the mean where it says nothing.

    Raises ModelError for one that says something else.
    """
    try:
        settings = json.loads((path / PLACE).read_text(encoding="utf-8"))
    except OSError:
        return "mean"
    except ValueError as error:
        raise ModelError(f"{path / PLACE} is not JSON: {error}") from None
    asked = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    if len(asked) != 1 or asked[0] not in KINDS:
        raise ModelError(f"{path / PLACE}: {', '.join(asked) or 'no pooling'} is not supported; {', '.join(KINDS)} are")
    return KINDS[asked[0]]
