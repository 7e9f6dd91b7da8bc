"""What control groups allow, read from folders as Linux shows them, in both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.engine.memory import read_available_bytes
from headrace.meter.cgroups import ControlGroups
from headrace.meter.peaks import count_cores

JOB = "0::/pod/job\n"
DOCKER = "7:name=systemd:/x\n4:memory:/docker/ab\n2:cpu,cpuacct:/docker/ab\n0::/\n"
UNLIMITED = "9223372036854771712"


def make_groups(folder: Path, membership: str, files: dict[str, str]) -> ControlGroups:
    (folder / "cgroup").write_text(membership)
    for name, text in files.items():
        path = folder / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return ControlGroups(folder / "fs", folder / "cgroup")


def make_quota(group: str, quota: int) -> dict[str, str]:
    """Files of version 1 in a group's folder."""
    return {f"cpu/{group}cpu.cfs_quota_us": str(quota), f"cpu/{group}cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        (JOB, {"pod/job/cpu.max": "250000 100000"}, 3),
        (JOB, {"pod/job/cpu.max": "max 100000", "pod/cpu.max": "400000 100000"}, 4),
        (JOB, {"pod/job/cpu.max": "600000 100000", "pod/cpu.max": "400000 100000", "cpu.max": "max 100000"}, 4),
        (JOB, {"pod/job/cpu.max": "1000 100000"}, 1),
        (JOB, {"pod/job/cpu.max": "max 100000"}, None),
        (JOB, {"pod/other/cpu.max": "100000 100000"}, None),
        (DOCKER, make_quota("", 150_000), 2),
        (DOCKER, make_quota("docker/ab/", 300_000) | make_quota("", -1), 3),
        (DOCKER, make_quota("docker/ab/", -1), None),
        ("", {"cpu.max": "200000 100000"}, None),
    ],
)
def test_quotas_of_all_groups_around_a_process_count(
    membership: str, files: dict[str, str], cores: int | None, tmp_path: Path
) -> None:
    assert make_groups(tmp_path, membership, files).count_cores() == cores


@pytest.mark.parametrize(
    ("membership", "files", "free"),
    [
        (JOB, {"pod/job/memory.max": "800000", "pod/job/memory.current": "700000"}, 100_000),
        (
            JOB,
            {
                "pod/job/memory.max": "800000",
                "pod/job/memory.current": "700000",
                "pod/memory.max": "900000",
                "pod/memory.current": "880000",
                "memory.current": "990000",
            },
            20_000,
        ),
        (JOB, {"pod/job/memory.max": "max", "pod/job/memory.current": "700000"}, None),
        (JOB, {"pod/job/memory.max": "600000", "pod/job/memory.current": "700000"}, 0),
        (
            DOCKER,
            {
                "memory/docker/ab/memory.limit_in_bytes": "800000",
                "memory/docker/ab/memory.usage_in_bytes": "700000",
                "memory/docker/ab/memory.stat": "inactive_file 1\ntotal_inactive_file 50000",
                "memory/memory.limit_in_bytes": UNLIMITED,
                "memory/memory.usage_in_bytes": "5000000",
            },
            150_000,
        ),
        ("", {"memory.max": "800000", "memory.current": "700000"}, None),
    ],
)
def test_the_narrowest_limit_of_memory_counts(
    membership: str, files: dict[str, str], free: int | None, tmp_path: Path
) -> None:
    groups = make_groups(tmp_path, membership, files)
    assert groups.read_free_bytes() == free
    assert free is None or read_available_bytes(groups) == free


def test_files_that_nobody_reads_are_free_memory(tmp_path: Path) -> None:
    files = {"memory.max": "800000", "memory.current": "700000"}
    idle = {"memory.stat": "anon 90000\ninactive_file 600000\nactive_file 10000"}
    assert read_available_bytes(make_groups(tmp_path, "0::/\n", files)) == 100_000
    assert read_available_bytes(make_groups(tmp_path, "0::/\n", files | idle)) == 700_000


def test_cores_are_those_that_a_quota_leaves(tmp_path: Path) -> None:
    missing = ControlGroups(tmp_path, tmp_path / "missing")
    all_cores = count_cores(missing)
    assert all_cores >= 1 and missing.read_free_bytes() is None and read_available_bytes(missing) > 0
    assert count_cores(make_groups(tmp_path, JOB, {"pod/cpu.max": "50000 100000"})) == 1
    assert count_cores(make_groups(tmp_path, JOB, {"pod/cpu.max": f"{all_cores}00001 100000"})) == all_cores
