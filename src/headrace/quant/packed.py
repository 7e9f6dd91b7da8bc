"""Packed weights on disk: a second start maps them into memory and neither reads, converts nor packs the checkpoint.

One safetensors file for a model, a number format and a form of packing. It is written whole or not at all, and anything
that cannot be read, or is not what it should be, is made anew. Shapes and types are looked at, numbers are not: a hash
of all of them would read the whole file at each start, a second for each gigabyte, where mapping it takes none.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger("headrace")

# Smaller models load at once anyway; larger ones are too much to keep unasked.
LEAST_BYTES, MOST_BYTES = 32 * 2**20, 4 * 2**30

# What no tensor is called.
NOTE = "note"

Numbers = tuple[int, ...]
Parts = dict[str, Tensor]


def read_note(path: Path) -> str:
    """How a packed file's weights were made, where that was not the usual way; "" for others and for no file."""
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get(NOTE, ""))
    except (OSError, SafetensorError):
        return ""


def remove_files(paths: Iterable[Path]) -> None:
    """Remove those that are there. Who has one mapped keeps it; one that cannot be removed only takes room."""
    for path in paths:
        with suppress(OSError):
            path.unlink()


class DamagedError(ValueError):
    """A part of a packed file is not what it should be. Says which, and how."""


class PackedFile:
    """Parts (tensors by name, and whole numbers) by the name of what they are parts of. `path` None keeps nothing.

    note says in words how they were made where that was not the usual way; such a file is read and written whatever its
    size. One that is given replaces what is there. `outdated` files go once this one is written."""

    def __init__(self, path: Path | None, note: str = "", outdated: Sequence[Path] = ()) -> None:
        self.path = path
        self.note = note
        self.outdated = outdated
        self._found: dict[str, tuple[Parts, Numbers]] = {}
        self._new: dict[str, tuple[Parts, Numbers]] = {}
        if path is not None and path.exists() and not note:
            self._read(path)

    @property
    def complete(self) -> bool:
        """Whether everything is here: a file is only written when it holds all of a model."""
        return bool(self._found)

    def take(self, name: str) -> tuple[Parts, Numbers] | None:
        """What was kept under this name, mapped from the file, or None where there is no file to read. Raises
        DamagedError where the file lacks it."""
        if self.complete and name not in self._found:
            raise DamagedError(f"it lacks {name}")
        return self._found.get(name)

    def discard(self, error: DamagedError) -> None:
        """Forget the file that was found: from now on all is made anew, and `write` replaces it."""
        log.warning("%s is damaged and is made anew: %s", self.path, error)
        self._found, self.note = {}, ""

    def keep(self, name: str, parts: Mapping[str, Tensor], numbers: Numbers = ()) -> None:
        """Note what `write` will write. The tensors must not change until then."""
        if self.path is not None:
            self._new[name] = (dict(parts), numbers)

    def write(self) -> None:
        """Write what was noted. A disk that refuses costs time at the next start, so it is a warning and no error."""
        tensors = {f"{name}/{part}": each for name, (parts, _) in self._new.items() for part, each in parts.items()}
        numbers = {name: json.dumps(each) for name, (_, each) in self._new.items()}
        self._new = {}
        usual = LEAST_BYTES <= sum(each.nbytes for each in tensors.values()) <= MOST_BYTES
        if self.path is None or not (usual or self.note):
            return
        # Of a name of its own: two starts at once that wrote into one file could leave holes in it.
        part = self.path.with_name(f"{self.path.name}.{uuid4().hex}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, metadata=numbers | {NOTE: self.note})
            # Renamed before its bytes are on the disk, a power cut would leave a whole header and weights of zeros.
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(self.path)
        except (OSError, SafetensorError) as error:
            # Another start that was done first has removed the part, and its file is as good.
            if not (isinstance(error, FileNotFoundError) and self.path.exists()):
                log.warning("packed weights are not kept for the next start: %s", error)
            remove_files([part])
        else:
            # Also the parts that killed starts have left.
            remove_files([*self.outdated, *self.path.parent.glob(f"{self.path.name}.*part")])

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                names: dict[str, Parts] = {}
                for key in file.keys():  # noqa: SIM118
                    name, part = key.rsplit("/", 1)
                    names.setdefault(name, {})[part] = file.get_tensor(key)
                facts = dict(file.metadata() or {})
            self.note = facts.pop(NOTE, "")
            numbers = {name: tuple(json.loads(each)) for name, each in facts.items()}
            self._found = {name: (parts, numbers[name]) for name, parts in names.items()}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read and is made anew: %s", path, error)
