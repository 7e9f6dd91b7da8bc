"""4-bit weights made with a text: GPTQ and AWQ beside plain rounding and the checkpoint's own blocks, and the best of
them kept for `--precision int4`. Which is best is measured on a part of the text that none of them has seen.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from headrace.checkpoint import Checkpoint
from headrace.core import InputError
from headrace.engine.forward import compute_hidden
from headrace.engine.loading import list_outdated, name_packed
from headrace.engine.memory import read_available_bytes
from headrace.judge.quality import measure_perplexity
from headrace.kernels import Kernels, Matrix, PackedWeight
from headrace.model import Model, ModelSettings, Rounding, load_model
from headrace.quant.awq import find_input_scales
from headrace.quant.gptq import round_by_gptq
from headrace.quant.int4 import Int4, round_groups
from headrace.quant.packed import read_note

# Of the windows, so many in a row are measured on: the last ones.
JUDGED_SHARE = 0.25
METHODS = ("rounding", "gptq", "awq", "awq and gptq")
STORED = "stored blocks"

Windows = list[list[int]]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Perplexity of the part of the text that was held back, in bf16 and by each method, and the best method: its name,
    and how it rounds, None as plain loading does."""

    plain: float
    perplexities: dict[str, float]
    best: str
    tokens: int
    way: Rounding | None


class Recorder:
    """Kernels that sum x x^T over the inputs of every product, by its weight, while `grams` is there to hold the sums.
    The arithmetic is another's."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.grams: dict[int, Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)

    def linear(self, x: Tensor, weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        if self.grams is not None:
            wide = x.float()
            gram = wide.T @ wide
            known = self.grams.get(id(weight))
            self.grams[id(weight)] = gram if known is None else known.add_(gram)
        return self.kernels.linear(x, weight, dtype)

    def norm_linear(self, x: Tensor | None, residual: Tensor, norm: Tensor, eps: float, weight: PackedWeight) -> Tensor:
        if x is not None:
            residual += x
        return self.linear(self.kernels.rms_norm(residual, norm, eps), weight)


def calibrate(checkpoint: Checkpoint, kernels: Kernels, windows: Windows, group: int, tell: Tell) -> Outcome:
    """Try every method; `keep` keeps the best one's weights. tell hears what comes next.

    Raises InputError for a text of too few windows, or where the sums do not fit the memory.
    """
    judged = int(len(windows) * JUDGED_SHARE)
    if judged < 1:
        raise InputError(f"calibrating needs {int(1 / JUDGED_SHARE)} windows of text or more, found {len(windows)}")
    seen, held_back = windows[:-judged], windows[-judged:]
    tell("inputs of every product")
    recorder = Recorder(kernels)
    plain = load_model(checkpoint, cast(Kernels, recorder), ModelSettings(precision="bf16"))
    check_memory(plain)
    grams = record_inputs(plain, recorder, seen)
    exact = measure_perplexity(plain, held_back, ignore).perplexity
    del plain
    # Of equal ones the first is kept: a checkpoint's own blocks, then the simplest.
    ways: dict[str, Rounding | None] = {STORED: None} if has_blocks(checkpoint) else {}
    text = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:8]
    ways |= {name: describe_rounding(name, grams, group, text) for name in METHODS}
    found = {}
    for name, way in ways.items():
        tell(name)
        model = load_model(checkpoint, kernels, ModelSettings(precision="int4", rounding=way))
        found[name] = measure_perplexity(model, held_back, ignore).perplexity
    best = find_best(found)
    return Outcome(exact, found, best, sum(len(window) - 1 for window in held_back), ways[best])


def find_best(perplexities: dict[str, float]) -> str:
    """The method of the lowest perplexity, the first of equal ones; one without a number is best only where all are."""
    return min(perplexities, key=lambda name: (math.isnan(perplexities[name]), perplexities[name]))


def record_inputs(model: Model, recorder: Recorder, windows: Windows) -> dict[str, Tensor]:
    """Sums of x x^T [in, in] over the inputs of every product but the head, by the product's name."""
    grams: dict[int, Tensor] = {}
    recorder.grams = grams
    for window in windows:
        compute_hidden(model, [window])
    # What the model computes from now on, the text that was held back above all, is none of theirs.
    recorder.grams = None
    return {each.name: grams[id(each.weight)] for each in model.products[:-1]}


def describe_rounding(method: str, grams: dict[str, Tensor], group: int, text: str) -> Rounding:
    """A method by its name, as loading takes it. text tells one text from another in what a job remembers."""
    format = Int4(group)

    def make(name: str, weight: Tensor) -> Matrix:
        wide, gram, scales = weight.float(), grams[name], None
        if "awq" in method:
            scales = find_input_scales(wide, gram, group)
            wide, gram = wide * scales, gram / torch.outer(scales, scales)
        parts = round_by_gptq(wide, gram, group) if "gptq" in method else round_groups(wide, group)
        return replace(format.describe(*parts), input_scales=None if scales is None else 1 / scales)

    return Rounding(f"4-bit groups of {group} by {method}, text {text}", make)


def keep(checkpoint: Checkpoint, kernels: Kernels, way: Rounding | None) -> None:
    """Make what `--precision int4` loads from now on: by a method, or as it would be without any calibration. What was
    kept before is replaced at once or stays. Raises OSError where the disk refuses."""
    path = find_kept(checkpoint, kernels)
    if way is None:
        path.unlink(missing_ok=True)
        return
    outdated = list_outdated(checkpoint, kernels.name)
    load_model(checkpoint, kernels, ModelSettings("int4", packed_path=path, outdated=outdated, rounding=way))
    if read_note(path) != way.note:
        raise OSError("they were not written")


def find_kept(checkpoint: Checkpoint, kernels: Kernels) -> Path:
    """Where the 4-bit weights lie that are loaded."""
    return name_packed(checkpoint, "int4", kernels.name)


def has_blocks(checkpoint: Checkpoint) -> bool:
    """Whether any weight is stored in 4-bit blocks that int4 multiplies as they are."""
    return any(checkpoint.blocks(name) is not None for name in checkpoint.names() if name.endswith("_proj.weight"))


def check_memory(model: Model) -> None:
    """Raises InputError where the sums of all products would take more than half of the memory that is free."""
    needed = sum(4 * each.weight.in_features**2 for each in model.products[:-1])
    free = read_available_bytes() // 2
    if needed > free:
        raise InputError(
            f"calibrating this model takes {needed / 2**30:.1f} GiB for its products' inputs, and only "
            f"{free / 2**30:.1f} GiB may be used: plain --precision int4 rounds without a text"
        )


def ignore(done: int, total: int) -> None:
    """Progress that nobody watches."""
