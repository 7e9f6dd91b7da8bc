"""What control groups leave a process of processor time and memory: Linux's cgroups, versions 1 and 2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# The limit, what is used of it, and what of that is files that nobody looks at: version 2, then version 1.
MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True, slots=True)
class ControlGroups:
    """The groups of one process: `root` is where their file systems are, `membership` names its own."""

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def count_cores(self) -> int | None:
        """Cores whose whole time the quotas allow, a begun one counted; None where no quota is set."""
        quotas = [read_quota(group) for group in self._list_groups("cpu")]
        return min((quota for quota in quotas if quota is not None), default=None)

    def read_free_bytes(self) -> int | None:
        """Memory that may still be taken, idle files among it: they are given back when it is needed.

        None where no limit is set; version 1 always has one, which may be more than any machine has.
        """
        rooms = [read_room(group, *names) for group in self._list_groups("memory") for names in MEMORY]
        return min((room for room in rooms if room is not None), default=None)

    def _list_groups(self, controller: str) -> list[Path]:
        """Folders of the process's own groups and of all around them, whose limits hold for it as well.

        In a container they may be named as the host sees them: such folders are missing, and the own one is the root.
        """
        groups: list[Path] = []
        for line in read_text(self.membership).splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            # Each controller of version 1 has a file system of its own; version 2 is one, and names none.
            own = (self.root / controller if controllers else self.root) / PurePosixPath(path).relative_to("/")
            groups += [group for group in (own, *own.parents) if group.is_relative_to(self.root)]
        return groups


OWN = ControlGroups()


def read_quota(group: Path) -> int | None:
    """Cores that a group's quota comes to, rounded up; None where it has none (`max`, or -1 in version 1)."""
    words = read_text(group / "cpu.max") or " ".join(
        read_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")
    )
    try:
        quota, period = (int(word) for word in words.split())
    except ValueError:
        return None
    return -(-quota // period) if quota > 0 and period > 0 else None


def read_room(group: Path, limit: str, used: str, idle: str) -> int | None:
    """Bytes within a group's limit that are free, or used by idle files; None where it has no limit."""
    try:
        room = int(read_text(group / limit)) - int(read_text(group / used))
    except ValueError:
        return None
    words = read_text(group / "memory.stat").split()
    return max(0, room + (int(words[words.index(idle) + 1]) if idle in words else 0))


def read_text(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
