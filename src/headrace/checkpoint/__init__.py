"""What is on disk: weights, configuration, tokenizer and chat template, in one shape whatever the format."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from headrace.checkpoint.base import Checkpoint, name_model
from headrace.checkpoint.gguf_file import GgufCheckpoint
from headrace.checkpoint.hashes import describe_files
from headrace.checkpoint.safetensors_folder import SafetensorsCheckpoint
from headrace.checkpoint.sources import resolve
from headrace.checkpoint.tokenizer import Tokenizer
from headrace.core import ModelError

__all__ = ["Checkpoint", "Tokenizer", "name_model", "open_checkpoint"]


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a model by known name, folder, .gguf file or hub id.

    Reads headers and configuration only; tensors are read one at a time. Pulls the default model if it is missing.
    Raises ModelError, one line saying what and where, for whatever is wrong with it.
    """
    path = resolve(str(model))
    try:
        files = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
        state = describe_files(files)
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return _open(path, state)


@lru_cache(maxsize=1)
def _open(path: Path, state: str) -> Checkpoint:
    """A job looks at a checkpoint before it loads the model: it is parsed once, unless its files have changed."""
    return SafetensorsCheckpoint(path) if path.is_dir() else GgufCheckpoint(path)
