"""The header of a GGUF file: metadata and where each tensor lies, checked against the length of the file.

Knows the container format (GGUF specification, versions 2 and 3, little-endian) and nothing of models. The gguf
library's own reader needs ten seconds for a vocabulary of 262,144 tokens and trusts every count and offset.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from headrace.core import ModelError

FETCH_AGAIN = "fetch the file again"
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
NUMPY_TYPES = {10: "<u8", 11: "<i8"}  # where numpy's letter differs from struct's
STRING, ARRAY = 8, 9
TYPES = GGMLQuantizationType
SUPPORTED_TYPES = frozenset(
    {TYPES.F32, TYPES.F16, TYPES.BF16, TYPES.Q4_0, TYPES.Q4_1, TYPES.Q5_0, TYPES.Q5_1, TYPES.Q8_0}
    | {TYPES.Q2_K, TYPES.Q3_K, TYPES.Q4_K, TYPES.Q5_K, TYPES.Q6_K}
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as stored: shape with the outermost dimension first, and its bytes' place in the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata by key (numbers, strings, lists of strings, numpy arrays) and tensors by the file's own names."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


class Cursor:
    """Reads values one after another; a read past the end raises ModelError instead of inventing data."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what} at byte {self.position}; {FETCH_AGAIN}")

    def reserve(self, count: int) -> int:
        """Step over `count` bytes that must be there; returns where they start."""
        start = self.position
        if count > len(self.data) - start:
            raise self.fail("truncated or damaged GGUF file: its header ends early")
        self.position += count
        return start

    def unpack(self, layout: str) -> Any:
        return struct.unpack_from(layout, self.data, self.reserve(struct.calcsize(layout)))[0]

    def text(self) -> str:
        length = self.unpack("<Q")
        start = self.reserve(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def value(self) -> Any:
        kind = self.unpack("<I")
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise self.fail(f"damaged GGUF file: unknown kind of metadata {kind}")
        return self.unpack(SCALARS[kind])

    def array(self) -> Any:
        kind, count = self.unpack("<I"), self.unpack("<Q")
        if kind == STRING:
            if count > (len(self.data) - self.position) // 8:
                raise self.fail("truncated or damaged GGUF file: its header ends early")
            return [self.text() for _ in range(count)]
        if kind not in SCALARS:
            raise self.fail(f"damaged GGUF file: unknown kind of array {kind}")
        dtype = np.dtype(NUMPY_TYPES.get(kind, SCALARS[kind]))
        start = self.reserve(count * dtype.itemsize)
        return np.frombuffer(self.data, dtype, count, start).copy()

    def repeat(self, count: int, what: str, read: Callable[[], tuple[str, Any]]) -> dict[str, Any]:
        """`count` named things. A repeated name is damage. Each takes 12 bytes or more, so a wild count ends soon."""
        found: dict[str, Any] = {}
        for _ in range(count):
            name, value = read()
            if name in found:
                raise self.fail(f"damaged GGUF file: {what} {name!r} appears twice")
            found[name] = value
        return found

    def metadata_entry(self) -> tuple[str, Any]:
        return self.text(), self.value()

    def tensor_entry(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        """Name, (shape, type number, offset in the data part). GGUF lists the innermost dimension first."""
        name, dimensions = self.text(), self.unpack("<I")
        if dimensions > 4:
            raise self.fail(f"damaged GGUF file: tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.unpack("<Q") for _ in range(dimensions))[::-1]
        return name, (shape, self.unpack("<I"), self.unpack("<Q"))


def read_header(path: Path) -> GgufHeader:
    """Read and check the header. Raises ModelError, naming the file and the place, for anything wrong with it."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return parse_header(path, data)
    except ValueError as error:  # an empty file cannot be mapped
        raise ModelError(f"{path}: not a GGUF file: it is empty; {FETCH_AGAIN}") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


def parse_header(path: Path, data: mmap.mmap) -> GgufHeader:
    cursor = Cursor(path, data)
    if data[:4] != b"GGUF":
        start = bytes(data[:4])
        raise ModelError(f"{path}: not a GGUF file: it begins with {start!r} instead of b'GGUF'; {FETCH_AGAIN}")
    cursor.reserve(4)
    version = cursor.unpack("<I")
    if version not in (2, 3):
        big = " (big-endian)" if version & 0xFFFF == 0 else ""
        raise ModelError(f"{path}: GGUF version {version}{big} is not supported; convert it to GGUF 3, little-endian")
    tensor_count, metadata_count = cursor.unpack("<Q"), cursor.unpack("<Q")
    metadata = cursor.repeat(metadata_count, "metadata key", cursor.metadata_entry)
    entries = cursor.repeat(tensor_count, "tensor", cursor.tensor_entry)
    if metadata.get("split.count", 1) not in (0, 1):
        raise ModelError(f"{path}: one of {metadata['split.count']} parts; join them with `llama-gguf-split --merge`")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"damaged GGUF file: alignment {alignment!r} is not a power of two")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {name: place_tensor(path, name, entry, data_start, len(data)) for name, entry in entries.items()}
    return GgufHeader(path, metadata, tensors)


def place_tensor(
    path: Path, name: str, entry: tuple[tuple[int, ...], int, int], data_start: int, file_bytes: int
) -> TensorEntry:
    """Where a tensor's bytes lie; raises ModelError unless its type is supported and all of it is in the file."""
    shape, number, offset = entry
    known = number in TYPES._value2member_map_
    if not known or TYPES(number) not in SUPPORTED_TYPES:
        label = TYPES(number).name if known else str(number)
        right = ", ".join(each.name for each in sorted(SUPPORTED_TYPES))
        raise ModelError(f"{path}: tensor {name!r} has unsupported type {label}; use a file with {right}")
    block, block_bytes = GGML_QUANT_SIZES[TYPES(number)]
    if not shape or 0 in shape or shape[-1] % block:
        raise ModelError(f"{path}: damaged GGUF file: tensor {name!r} has impossible shape {shape}; {FETCH_AGAIN}")
    nbytes, start = math.prod(shape) // block * block_bytes, data_start + offset
    if start + nbytes > file_bytes:
        raise ModelError(
            f"{path}: truncated GGUF file: tensor {name!r} ends at byte {start + nbytes}, the file at {file_bytes}; "
            + FETCH_AGAIN
        )
    return TensorEntry(shape, TYPES(number), start, nbytes)
