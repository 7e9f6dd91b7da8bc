"""What every checkpoint offers, whatever its format on disk. Knows nothing of models' equations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from headrace.checkpoint.tokenizer import Tokenizer


def name_model(path: Path) -> str:
    """The name by which reports and responses call the model in this folder or file."""
    return path.stem if path.suffix == ".gguf" else path.name


class Blocks(NamedTuple):
    """A matrix as 4-bit blocks, in Hugging Face's row order: a weight is value * scale + minimum. values uint8
    [out, in] from 0 to 15; scales and minimums float16 [out, blocks]."""

    values: Tensor
    scales: Tensor
    minimums: Tensor


class Checkpoint(Protocol):
    """Weights, configuration and tokenizer of one model, in Hugging Face's names and layout.

    `config` has the names and shape of Hugging Face's config.json of a text model, whatever the file's own metadata.
    Two names are GGUF's: `rope_scaling = {"rope_type": "factors", "factors": [...]}` with head_dim / 2 numbers, each
    the divisor of one rotary frequency (how it stores Llama 3's scaling), and `pooling_type`, llama.cpp's number.
    """

    @property
    def path(self) -> Path:
        """The folder or the file."""
        ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        ...

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor in Hugging Face's layout and head order, owned by the caller.

        float32, float16 or bfloat16 as stored; float32 where it was quantised. Raises ModelError if it is missing or
        of a type that is not supported.
        """
        ...

    def blocks(self, name: str) -> Blocks | None:
        """A tensor's 4-bit blocks, where it is stored so; None where it is not."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, built once. Raises ModelError if it is missing or of an unsupported kind."""
        ...

    def hash(self) -> str:
        """SHA-256 over the weight files, as hexadecimal digits."""
        ...
