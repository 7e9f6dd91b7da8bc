"""How much memory this process may still take, and what it gives back. Knows nothing of models."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from headrace.meter.cgroups import OWN, ControlGroups


def read_available_bytes(groups: ControlGroups = OWN) -> int:
    """Memory that can be had without swapping, within the control groups' limits where one is set."""
    available, allowed = _read_machine(), groups.read_free_bytes()
    return available if allowed is None else min(available, allowed)


def give_back_memory() -> None:
    """Let the system have what was freed: the C library keeps it, as the kernels told it, for what is next."""
    with suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _read_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc on this system: ask the C library, which leaves reclaimable cache out
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
