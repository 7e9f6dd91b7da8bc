"""Follows an engine: where time went, what was computed, how near that came to what the machine can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.meter.energy import EnergyCounter
from headrace.meter.operations import Cost, ModelShape, Piece, count_step
from headrace.meter.peaks import Peaks
from headrace.meter.stopwatch import Stopwatch
from headrace.meter.trace import TraceWriter

# Points of the timeline; where a run has more steps, neighbours are put together.
MOST_POINTS = 2000

# In the order of the report. What passes between kernels is torch's gathers and Python.
KERNEL_PARTS = ("matrix products", "attention", "other kernels", "between kernels")
PARTS = (*KERNEL_PARTS, "scheduling", "sampling", "tokenization", "files", "measuring loss")


@dataclass(slots=True)
class Phase:
    """What was done for prompts, or for outputs. floor is the least time that the peaks allow for it."""

    seconds: float = 0.0
    tokens: int = 0
    cost: Cost = field(default_factory=Cost)
    arithmetic_seconds: float = 0.0
    memory_seconds: float = 0.0
    floor_seconds: float = 0.0


class Meter:
    """See the module. One for each engine; `peaks` is None where this machine has not been measured. The watch is the
    one that the engine's kernels tell."""

    def __init__(self, shape: ModelShape, peaks: Peaks | None, watch: Stopwatch) -> None:
        self.shape = shape
        self.peaks = peaks
        self.watch = watch
        self.operators: dict[str, Cost] = {}
        self.phases = {"prefill": Phase(), "decode": Phase()}
        self.timeline: list[list[float]] = []
        self.began = time.perf_counter()
        self._energy = EnergyCounter()
        self._trace: TraceWriter | None = None
        self._steps_a_point = 1
        self._pending: list[list[float]] = []

    def write_trace(self, path: Path, tell: Callable[[str], None]) -> None:
        """Write every step and its parts to this file from now on, as a Chrome trace. Raises OSError where it cannot be
        opened; `tell` hears of a trace that ends early."""
        self._trace = self.watch.listener = TraceWriter(path, time.perf_counter(), tell)

    def close(self) -> None:
        if self._trace is not None:
            self._trace.close()
            self._trace = self.watch.listener = None

    def count(self, pieces: Sequence[Piece], began: float) -> None:
        """Count a step that has been computed since `began` (of time.perf_counter)."""
        now = time.perf_counter()
        self._energy.follow(now)
        costs = count_step(self.shape, pieces)
        for name, cost in costs.items():
            self.operators.setdefault(name, Cost()).add(cost)
        self._count_phases(pieces, costs, now - began)
        prompt = sum(piece.length for piece in pieces if not piece.output)
        output = sum(piece.length for piece in pieces if piece.output)
        self._draw([began - self.began, now - began, prompt, output, len(pieces)])
        if self._trace is not None:
            details = {"prompt tokens": prompt, "output tokens": output, "sequences": len(pieces)}
            self._trace.write("step", began, now, details)

    def _count_phases(self, pieces: Sequence[Piece], costs: dict[str, Cost], seconds: float) -> None:
        """A step of prompts and outputs is divided by operations; a weight that both use is read once."""
        outputs = [piece for piece in pieces if piece.output]
        share = 1.0 if len(outputs) == len(pieces) else 0.0
        if outputs and share == 0.0:
            part = sum(cost.operations for cost in count_step(self.shape, outputs).values())
            share = part / sum(cost.operations for cost in costs.values())
        for name, weight in (("prefill", 1 - share), ("decode", share)):
            if weight == 0.0:
                continue
            phase = self.phases[name]
            phase.seconds += seconds * weight
            phase.tokens += sum(piece.length for piece in pieces if piece.output == (name == "decode"))
            for operator, cost in costs.items():
                phase.cost.add(cost, weight)
                arithmetic, memory = self._floor(operator, cost)
                phase.arithmetic_seconds += arithmetic * weight
                phase.memory_seconds += memory * weight
                phase.floor_seconds += max(arithmetic, memory) * weight

    def _floor(self, operator: str, cost: Cost) -> tuple[float, float]:
        """Seconds that an operator's arithmetic and its bytes take at the machine's peaks."""
        if self.peaks is None:
            return 0.0, 0.0
        number_format = next((p.format for p in self.shape.products if p.name == operator), self.shape.format)
        return cost.operations / self.peaks.operations[number_format], cost.bytes / self.peaks.memory["read"]

    def _draw(self, step: list[float]) -> None:
        """Add a step to the timeline: [start, seconds, prompt tokens, output tokens, sequences on average]."""
        self._pending.append(step)
        if len(self._pending) < self._steps_a_point:
            return
        self.timeline.append(join_steps(self._pending))
        self._pending = []
        if len(self.timeline) >= MOST_POINTS:
            self._steps_a_point *= 2
            self.timeline = [join_steps(self.timeline[i : i + 2]) for i in range(0, len(self.timeline), 2)]

    def describe(self, seconds: float) -> dict[str, Any]:
        """What the report says of a run of so many seconds. mfu, mbu and floor_share are None without peaks."""
        parts = self.seconds_by_part(seconds)
        both = Phase()
        for phase in self.phases.values():
            both.seconds += phase.seconds
            both.tokens += phase.tokens
            both.cost.add(phase.cost)
            both.arithmetic_seconds += phase.arithmetic_seconds
            both.memory_seconds += phase.memory_seconds
            both.floor_seconds += phase.floor_seconds
        # The run as a whole answers for all of its time, not for its steps only.
        both.seconds = seconds
        return {
            **self._describe_phase(both),
            **{name: self._describe_phase(phase) for name, phase in self.phases.items()},
            "energy_j": self._energy.read(),
            "time_by_part_s": {name: round(value, 3) for name, value in parts.items()},
            "operators": self._describe_operators(),
            "timeline": [[round(value, 4) for value in point] for point in [*self.timeline, *self._pending]],
            "peaks": None
            if self.peaks is None
            else {"operations_per_s": dict(self.peaks.operations), "memory_bytes_per_s": dict(self.peaks.memory)},
        }

    def seconds_by_part(self, seconds: float) -> dict[str, float]:
        """Seconds of a run by part; what no part claims is `waiting`. Products are put together here."""
        found = dict.fromkeys(PARTS, 0.0)
        for name, value in self.watch.seconds.items():
            found["matrix products" if name.startswith("product ") else name] += value
        found["waiting"] = max(0.0, seconds - sum(found.values()))
        return found

    def _describe_phase(self, phase: Phase) -> dict[str, Any]:
        known = self.peaks is not None and phase.seconds > 0
        return {
            "tokens": phase.tokens,
            "seconds": round(phase.seconds, 4),
            "operations": phase.cost.operations,
            "bytes": phase.cost.bytes,
            "mfu": round(phase.arithmetic_seconds / phase.seconds, 4) if known else None,
            "mbu": round(phase.memory_seconds / phase.seconds, 4) if known else None,
            "floor_share": round(phase.floor_seconds / phase.seconds, 4) if known else None,
        }

    def _describe_operators(self) -> dict[str, dict[str, Any]]:
        described = {}
        shapes = {product.name: product for product in self.shape.products}
        for name, cost in self.operators.items():
            product = shapes.get(name)
            part = name if product is None else product_part(product.in_features, product.out_features)
            described[name] = {
                "operations": cost.operations,
                "bytes": cost.bytes,
                "seconds": round(self.watch.seconds.get(part, 0.0), 4),
                "format": self.shape.format if product is None else product.format,
            }
        return described


def product_part(in_features: int, out_features: int) -> str:
    """The stopwatch's part for products of this shape."""
    return f"product {in_features} x {out_features}"


def join_steps(steps: Iterable[list[float]]) -> list[float]:
    """Steps as one: from the first's start, sums of seconds and tokens, sequences weighted by seconds."""
    steps = list(steps)
    seconds = sum(step[1] for step in steps)
    sequences = sum(step[1] * step[4] for step in steps) / seconds if seconds else 0.0
    return [steps[0][0], seconds, sum(step[2] for step in steps), sum(step[3] for step in steps), sequences]
