"""What is on disk: weights, configuration, tokenizer and chat template, in one shape whatever the format."""

from __future__ import annotations

from pathlib import Path

from headrace.checkpoint.base import Checkpoint, name_model
from headrace.checkpoint.gguf_file import GgufCheckpoint
from headrace.checkpoint.safetensors_folder import SafetensorsCheckpoint
from headrace.checkpoint.sources import resolve
from headrace.checkpoint.tokenizer import Tokenizer

__all__ = ["Checkpoint", "Tokenizer", "name_model", "open_checkpoint"]


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a model by known name, folder, .gguf file or hub id.

    Reads headers and configuration only; tensors are read one at a time. Pulls the default model if it is missing.
    Raises ModelError, one line saying what and where, for whatever is wrong with it.
    """
    path = resolve(str(model))
    return SafetensorsCheckpoint(path) if path.is_dir() else GgufCheckpoint(path)
