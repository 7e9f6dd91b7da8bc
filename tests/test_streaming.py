"""200,000 rows through `headrace run`: memory does not grow with the file."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

ROWS = 200_000
LIMIT_BYTES = 1 << 30


def peak_bytes(folder: Path, model: Path, rows: int) -> int:
    """Peak memory of a whole run over this many trivial rows, and a check of its result."""
    source, target = folder / f"{rows}.csv", folder / f"{rows}.out.csv"
    with source.open("w") as file:
        file.write("word\n")
        file.writelines(f"row {index}\n" for index in range(rows))
    command = [
        sys.executable,
        "-m",
        "headrace",
        "run",
        str(source),
        "-o",
        str(target),
        "--prompt",
        "{{ word }}",
        "--quiet",
    ]
    command += [
        "--model",
        str(model),
        "--max-tokens",
        "1",
        "--no-chat",
        "--precision",
        "fp32",
        "--max-sequences",
        "256",
    ]
    subprocess.run(command, check=True, timeout=600)
    report = json.loads((folder / f"{rows}.out.csv.report.json").read_text())
    assert report["succeeded"] == rows and report["failed"] == 0
    with target.open(newline="") as file:
        assert sum(1 for _ in csv.reader(file)) == rows + 1
    return int(report["peak_rss_bytes"])


def test_memory_does_not_grow_with_the_file(tmp_path: Path, tiny_model: Path) -> None:
    small = peak_bytes(tmp_path, tiny_model, 1000)
    large = peak_bytes(tmp_path, tiny_model, ROWS)
    assert large - small < LIMIT_BYTES
