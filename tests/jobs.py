"""Helpers of the tests of whole jobs: small inputs, the tiny model's options, reading results back."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from headrace.job.run import run_job
from headrace.options import EngineOptions, RunOptions, SamplingOptions

Rows = list[dict[str, Any]]


def engine_options(model: Path, **changes: Any) -> EngineOptions:
    settings = {"precision": "fp32", "block_size": 16, "kv_cache_bytes": 4 << 20, "threads": 1, "max_sequences": 8}
    return EngineOptions(model=str(model), **(settings | changes))


def run(
    model: Path, source: Path | str, output: Path, sampling: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Run a job quietly; `sampling` and `options` are settings of those two option classes."""
    own = SamplingOptions(**({"max_tokens": 4} | (sampling or {})))
    return run_job(str(source), str(output), engine_options(model), own, RunOptions(**({"quiet": True} | options)))


def batch_row(name: str, content: str, **body: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": content}]} | body
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def batch_rows(count: int, **body: Any) -> Rows:
    return [batch_row(f"row-{index}", f"What does wheel {index} grind?", **body) for index in range(count)]


def write_lines(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(path: Path) -> Rows:
    """The lines of an OpenAI Batch output without the time stamps."""
    lines = read_lines(path)
    for line in lines:
        if line["response"] is not None:
            line["response"]["body"].pop("created")
    return lines


def answer_of(line: dict[str, Any]) -> str:
    return str(line["response"]["body"]["choices"][0]["message"]["content"])


def read_journal(output: Path) -> dict[int, bytes]:
    """The finished rows of a job, which another process may be writing at this instant."""
    journal = Path(f"{output}.journal")
    if not journal.exists():
        return {}
    database = sqlite3.connect(f"file:{journal}?mode=ro", uri=True)
    try:
        return dict(database.execute("SELECT row, record FROM rows"))
    except sqlite3.OperationalError:
        return {}  # its tables are not made yet
    finally:
        database.close()


def run_killed(model: Path, source: Path, output: Path, kills: int, kv_cache_bytes: int) -> int:
    """Run a job killed with SIGKILL so many times; its rows, of which none was lost and none computed twice."""
    killer = Path(__file__).with_name("job_killer.py")
    command = [sys.executable, *map(str, (killer, model, source, output, kills, kv_cache_bytes))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=killer.parent, timeout=500)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    # Rows are only ever inserted, and none that was finished changed.
    assert said["begins"] == sorted(said["begins"]) and said["changed"] == 0, said
    assert said["killed"] == kills, said
    assert len(set(said["begins"])) > 3, "the kills must have hit the job at work"
    return int(said["rows"])
