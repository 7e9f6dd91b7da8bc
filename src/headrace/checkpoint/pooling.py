"""How a model makes one vector of a text, by its own configuration. Knows nothing of hidden states."""

from __future__ import annotations

import json
from pathlib import Path

from headrace.checkpoint import open_checkpoint
from headrace.checkpoint.safetensors_folder import read_json
from headrace.core import ModelError, Pooling

# Where sentence-transformers keeps it, and its names for what there is.
PLACE = "1_Pooling"
KINDS: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
# Its parts of a model of which nothing is lost here: vectors are made of length 1 anyway.
MODULES = ("Transformer", "Pooling", "Normalize")
# llama.cpp's numbers; 0 is none, which says nothing of how to make one vector.
GGUF_KINDS: dict[object, Pooling] = {None: "mean", 0: "mean", 1: "mean", 3: "last"}


def read_pooling(path: Path) -> Pooling:
    """The pooling of the model in this folder or file; the mean where it says nothing.

    Raises ModelError for one that says something else.
    """
    if path.is_file():
        number = open_checkpoint(path).config.get("pooling_type")
        if number not in GGUF_KINDS:
            raise ModelError(f"{path}: pooling_type {number} is not supported; 1 (the mean) and 3 (the last token) are")
        return GGUF_KINDS[number]
    file = path / find_place(path / "modules.json") / "config.json"
    if not file.exists():
        return "mean"
    settings = read_json(file, "")
    asked = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    if len(asked) != 1 or asked[0] not in KINDS:
        raise ModelError(f"{file}: {', '.join(asked) or 'no pooling'} is not supported; {', '.join(KINDS)} are")
    return KINDS[asked[0]]


def find_place(modules: Path) -> str:
    """The pooling's folder, from sentence-transformers' list of the model's parts, if there is one.

    Raises ModelError for a part that would change the vectors, such as a projection.
    """
    if not modules.exists():
        return PLACE
    try:
        found = {str(each["type"]).rpartition(".")[2]: str(each["path"]) for each in json.loads(modules.read_bytes())}
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ModelError(f"{modules}: not a list of modules ({error}); fetch the file again") from error
    other = sorted(found.keys() - set(MODULES))
    if other:
        raise ModelError(f"{modules}: vectors of a model with {other[0]} are not supported; {', '.join(MODULES)} are")
    return found.get("Pooling", PLACE)
