"""What this machine can do at most, measured once and kept: operations a second by number format, bytes a second.

Knows how to time a call and when not to believe the times; what is called comes from `kernels.peaks`.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.core import HeadraceError
from headrace.meter.cgroups import OWN, ControlGroups
from headrace.meter.kept import kept_path, read_kept, write_kept

SAMPLES = 9
ATTEMPTS = 5
MOST_SCATTER = 0.10
SAMPLE_SECONDS = 0.04


class NoisyMachine(HeadraceError):
    """Times scattered too much to be called a measurement."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Peaks:
    """Limits of one machine by so many threads.

    operations  a second, by number format (a multiply-add counts two): the higher of the best product and of
                multiply-adds that never leave the registers
    products    a second, by number format and rows: what our own matrix products reach, weights of 2048 x 2048
    memory      bytes a second: read, write, copy (both directions counted)
    """

    machine: str
    threads: int
    operations: Mapping[str, float]
    products: Mapping[str, Mapping[str, float]]
    memory: Mapping[str, float]


def count_cores(groups: ControlGroups = OWN) -> int:
    """Processor cores that this process may use: those that it may run on, or fewer if its groups allow less time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, groups.count_cores() or cores)


def describe_machine(instruction_set: str) -> str:
    """The processor's name with what the kernels use of it, as the identity of a measurement."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "cpu family", "model\t", "stepping")):
                name += " " + line.split(":")[1].strip()
            if not line:
                break
    except OSError:
        pass  # not Linux: the name must do
    return f"{name} {instruction_set}"


def peaks_path() -> Path:
    return kept_path("peaks.json")


def load_peaks(machine: str, threads: int, path: Path | None = None) -> Peaks | None:
    """What was measured on this machine with so many threads, or None."""
    try:
        entries = read_kept(path or peaks_path())
        return next(
            (Peaks(**entry) for entry in entries if (entry["machine"], entry["threads"]) == (machine, threads)), None
        )
    except (ValueError, TypeError, KeyError):
        return None


def save_peaks(peaks: Peaks, path: Path | None = None) -> Path:
    """Keep a measurement in place of an older one of the same machine and threads. Raises OSError."""
    path = path or peaks_path()
    entries: list[dict[str, Any]] = read_kept(path) or []
    kept = [each for each in entries if (each.get("machine"), each.get("threads")) != (peaks.machine, peaks.threads)]
    write_kept(path, [*kept, asdict(peaks)])
    return path


def measure_rate(amount: Callable[[], float], what: str) -> float:
    """Amount a second, the fastest of several samples: `amount` does some work and says how much it was.

    A sample repeats the work for a moment. Where the middle half of the samples scatters by more than a tenth the
    machine is busy, and they are taken again; after a few attempts raises NoisyMachine.
    """
    for _ in range(ATTEMPTS):
        rates = [sample_rate(amount) for _ in range(SAMPLES)]
        low, middle, high = statistics.quantiles(rates, n=4)
        if (high - low) / middle <= MOST_SCATTER:
            return max(rates)
    raise NoisyMachine(
        f"{what}: {SAMPLES} measurements scatter by {(high - low) / middle:.0%} (at most {MOST_SCATTER:.0%} is "
        "believed): something else uses this machine; try again when it is quiet"
    )


def sample_rate(amount: Callable[[], float]) -> float:
    began, done = time.perf_counter(), 0.0
    while (passed := time.perf_counter() - began) < SAMPLE_SECONDS or done == 0.0:
        done += amount()
    return done / passed
