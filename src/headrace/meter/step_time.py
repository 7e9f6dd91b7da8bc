"""What a step takes on this machine: seconds from the tokens, sequences and contexts of its pieces.

A model of cost in the manner of Vidur (arXiv 2405.05465, section 4) for one machine: what products cost is a table by
the number of tokens, measured with the real engine; attention adds seconds for each pair of a token and one that it
sees. Knows numbers only; who measures them is `plan.fitting`.
"""

from __future__ import annotations

import shlex
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from headrace.meter.kept import kept_path, read_kept, write_kept
from headrace.meter.operations import Piece, count_seen
from headrace.meter.report import list_versions
from headrace.options import EngineOptions

# Settings that change a step's time: a measurement is kept by them, beside the model and the processor.
MEASURED = ("precision", "device", "kernels", "threads", "block_size", "kv")
# What decides those, and the rest of what a measurement is kept by: the flags of `headrace bench steps`.
ASKED = ("model", *MEASURED, "instruction_set", "tuned")

# Products work in tiles of about so many rows.
TILE = 32

Table = Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step.

    tokens   by tokens computed: every layer's products and what a step costs at all
    wanted   by rows whose next token is chosen: the head, sampling, and what a sequence costs
    chunk    seconds a pair of tokens, in chunks of several tokens; summed over layers
    own      the same in chunks of one token, over context that no other sequence of the step reads
    shared   the same over a prefix that another one reads as well
    windows  what each layer sees, None for all
    error    by which share a pile's time was missed when this was measured; setting says for what it holds
    watts    of the processor while it was measured, None where no counter can be read
    """

    setting: str
    tokens: Table
    wanted: Table
    chunk: float
    own: float
    shared: float
    windows: tuple[int | None, ...]
    error: float
    watts: float | None = None

    def predict(self, pieces: Iterable[Piece]) -> float:
        """Seconds that a step of these pieces takes."""
        pieces = list(pieces)
        seconds = interpolate(self.tokens, sum(piece.length for piece in pieces))
        return seconds + interpolate(self.wanted, sum(piece.wanted for piece in pieces)) + self.attend(pieces)

    def attend(self, pieces: Iterable[Piece]) -> float:
        """Seconds of attention alone."""
        kinds = {window: self.windows.count(window) for window in set(self.windows)}
        return sum(layers * self._attend(piece, window) for piece in pieces for window, layers in kinds.items())

    def scale(self, factor: float) -> StepTime:
        """The same with every second `factor` times as long."""
        return replace(
            self,
            tokens=[(count, seconds * factor) for count, seconds in self.tokens],
            wanted=[(count, seconds * factor) for count, seconds in self.wanted],
            chunk=self.chunk * factor,
            own=self.own * factor,
            shared=self.shared * factor,
        )

    def most_tokens(self, seconds: float, most: int) -> int:
        """Tokens, at most `most`, that a step may compute in so many seconds, were each a row's next: whole tiles, and
        one at least. Attention over long contexts comes on top."""
        tiles = range(2, most // TILE + 1)

        def take(tile: int) -> float:
            return interpolate(self.tokens, tile * TILE) + interpolate(self.wanted, tile * TILE)

        return min(most, (bisect_right(tiles, seconds, key=take) + 1) * TILE)

    def _attend(self, piece: Piece, window: int | None) -> float:
        seen = count_seen(piece.start, piece.length, window)
        if piece.length > 1:
            return self.chunk * seen
        # Of a shared prefix no more than is read at all: a policy may choose some of it.
        shared = min(piece.shared, piece.start) if window is None else 0
        return self.own * (seen - shared) + self.shared * shared


def interpolate(table: Table, count: int) -> float:
    """Seconds for a count, on the line between its neighbours in the table; beyond the end as between the last two."""
    if count == 0:
        return 0.0
    place = min(max(1, bisect_right(table, count, key=lambda entry: entry[0])), len(table) - 1)
    (low, before), (high, after) = table[place - 1], table[place]
    return max(0.0, before + (after - before) * (count - low) / (high - low))


def describe_setting(model_hash: str, machine: str, resolved: dict[str, Any]) -> str:
    """For what a measurement holds: the model, the processor, the settings and versions that change a step's time."""
    versions = {name: number for name, number in list_versions().items() if name in ("headrace", "torch")}
    facts = {name: resolved[name] for name in MEASURED} | versions
    return " ".join([model_hash[:16], machine, *(f"{name}={value}" for name, value in facts.items())])


def spell_command(options: EngineOptions) -> str:
    """The command that measures what steps take under these options; what has its default is left out."""
    words = ["headrace", "bench", "steps"]
    for each in fields(EngineOptions):
        value, flag = getattr(options, each.name), each.name.replace("_", "-")
        if each.name not in ASKED or value == each.default:
            continue
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join(words)


def step_times_path() -> Path:
    return kept_path("step_times.json")


def load_step_time(setting: str, path: Path | None = None) -> StepTime | None:
    """What was measured for this setting, or None."""
    try:
        entry = read_kept(path or step_times_path())[setting]
        tables = {name: [(int(count), float(value)) for count, value in entry[name]] for name in ("tokens", "wanted")}
        return StepTime(**{**entry, **tables, "windows": tuple(entry["windows"])})
    except (ValueError, TypeError, KeyError):
        return None


def save_step_time(found: StepTime, path: Path | None = None) -> Path:
    """Keep a measurement in place of an older one of its setting. Raises OSError."""
    path = path or step_times_path()
    entries: dict[str, Any] = read_kept(path) or {}
    entries[found.setting] = asdict(found)
    write_kept(path, entries)
    return path
