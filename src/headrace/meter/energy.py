"""Energy of the processor packages, from the counters that Linux shows (RAPL), where they may be read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/class/powercap")
# Counters begin again after some 260,000 joules: the quickest processors take minutes for that.
SECONDS_BETWEEN = 30.0


class EnergyCounter:
    """Joules of all packages since it was made, the whole machine's and not this process's alone."""

    def __init__(self, root: Path = ROOT) -> None:
        zones = [zone for zone in sorted(root.glob("*-rapl:*")) if zone.name.count(":") == 1 and is_package(zone)]
        self._last = {zone: read_number(zone / "energy_uj") for zone in zones}
        self._total = 0.0
        self._read_at = 0.0

    def follow(self, now: float) -> None:
        """To be called now and then, with the seconds of a clock: no beginning of the counters is missed."""
        if now - self._read_at >= SECONDS_BETWEEN:
            self._read_at = now
            self.read()

    def read(self) -> float | None:
        """Joules so far; None where no counter can be read."""
        for zone, before in self._last.items():
            now = read_number(zone / "energy_uj")
            if before is None or now is None:
                return None
            wrapped = (read_number(zone / "max_energy_range_uj") or 0) if now < before else 0
            self._total += (now - before + wrapped) / 1e6
            self._last[zone] = now
        return self._total if self._last else None


def is_package(zone: Path) -> bool:
    """Whether a zone counts a package alone: `psys` counts the packages once more. A zone without a name is one."""
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return True


def read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
