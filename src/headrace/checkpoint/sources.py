"""Where models come from: known names, folders, .gguf files, hub ids; and the list of those that are here.

Knows names and places; reads no weights.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headrace.checkpoint.download import pull
from headrace.checkpoint.gguf_config import translate_config
from headrace.checkpoint.gguf_header import read_header
from headrace.checkpoint.known import KNOWN_MODELS, models_folder
from headrace.checkpoint.safetensors_folder import PICKLE_SUFFIXES
from headrace.core import ModelError
from headrace.options import DEFAULT_MODEL

__all__ = ["ModelListing", "list_models", "pull", "resolve"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
HUB_FILES += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
HUB_FILES += ["special_tokens_map.json", "added_tokens.json", "modules.json", "*_Pooling/config.json"]
# The same weights once more, in their makers' own layout; other folders hold other models.
HUB_REPEATS = ["consolidated*", "*/*.safetensors*"]


@dataclass(frozen=True, slots=True)
class ModelListing:
    """One model by name: its file, whether that is here or not; size in bytes; context in tokens."""

    name: str
    path: Path
    bytes: int
    family: str
    context: int
    format: Literal["safetensors", "gguf"]
    present: bool


def list_models() -> list[ModelListing]:
    """The known models, pulled or not, then other .gguf files that lie in the cache folder and can be read."""
    found = [
        ModelListing(known.name, known.path, known.bytes, known.family, known.context, "gguf", known.is_present())
        for known in KNOWN_MODELS.values()
    ]
    known_paths = {listing.path for listing in found}
    for path in sorted(models_folder().glob("*.gguf")):
        if path not in known_paths:
            try:
                config = translate_config(read_header(path), None)
            except ModelError:
                continue  # not a model that could be run, so not one to list
            size, context = path.stat().st_size, config["max_position_embeddings"]
            found.append(ModelListing(path.stem, path, size, config["model_type"], context, "gguf", True))
    return found


def resolve(model: str) -> Path:
    """The folder or .gguf file that a model setting means; the default model is pulled if it is missing.

    Raises ModelError saying what would be right: an unknown name, a missing file, a pickle file, a known model that
    is not pulled yet, a hub id that cannot be fetched.
    """
    known = KNOWN_MODELS.get(model)
    if known is not None:
        if known.is_present() or model == DEFAULT_MODEL:
            return pull(model)
        raise ModelError(f"model {model} is not here yet; fetch it with `headrace pull {model}`")
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise ModelError(f"{path}: pickle checkpoint refused, it can run code; use safetensors or GGUF")
        raise ModelError(f"{path}: not a .gguf file; for safetensors give the folder that holds them and config.json")
    if (models_folder() / f"{model}.gguf").is_file() and Path(model).name == model:
        return models_folder() / f"{model}.gguf"
    if HUB_ID.fullmatch(model) and path.suffix.lower() != ".gguf":
        return fetch_from_hub(model)
    near = difflib.get_close_matches(model, KNOWN_MODELS, n=1)
    hint = f"did you mean {near[0]}? It" if near else "it"
    names = ", ".join(KNOWN_MODELS)
    raise ModelError(
        f"model {model!r} is not here; {hint} must be a known name ({names}), a model folder, a .gguf file or a hub id"
    )


def fetch_from_hub(model: str) -> Path:
    """The local folder of a hub model, fetched if needed by the `hub` extra. Raises ModelError if it cannot be."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"model {model!r} is no folder here, and hub ids need an extra: pip install 'headrace[hub]'"
        ) from error
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=HUB_REPEATS))
    except Exception as error:  # the library raises its own, its HTTP client's and the system's errors
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"model {model!r} is no folder here, and the hub does not give it: {reason[0]}") from error
