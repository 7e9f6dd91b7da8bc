"""How much memory this process may still take. Knows nothing of models."""

from __future__ import annotations

import os
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")


def read_available_bytes() -> int:
    """Memory that can be had without swapping, within the control group's limit where one is set."""
    available = _read_machine()
    limit, used = _read_number(CONTROL_GROUP / "memory.max"), _read_number(CONTROL_GROUP / "memory.current")
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used + _read_idle_files()))
    return available


def _read_idle_files() -> int:
    """Bytes of files that the control group has read and nobody looks at: counted as used, given back when needed."""
    try:
        words = (CONTROL_GROUP / "memory.stat").read_text().split()
        return int(words[words.index("inactive_file") + 1])
    except (OSError, ValueError, IndexError):
        return 0


def _read_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc on this system: ask the C library, which leaves reclaimable cache out
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
