"""Run one job again and again, killing it with SIGKILL at random instants, until it is complete. A program of its own.

Each try is a fork of this process, which has loaded the code but computed nothing, so a try costs little. Prints a JSON
object: how often it was killed, how many finished rows each try began with, and how many of those changed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from jobs import engine_options, read_journal

from headrace.job.run import run_job
from headrace.options import EngineOptions, RunOptions, SamplingOptions


def answer(options: EngineOptions, source: str, output: Path) -> None:
    """In the fork: the whole job, and nothing of the parent's ending."""
    code = 1
    try:
        run_job(source, str(output), options, SamplingOptions(max_tokens=24), RunOptions(quiet=True))
        code = 0
    finally:
        os._exit(code)


def main(model: Path, source: str, output: Path, kills: int, kv_cache_bytes: int) -> None:
    options = engine_options(model, max_sequences=6, kv_cache_bytes=kv_cache_bytes)
    source_of_delays = random.Random(7)
    known: dict[int, bytes] = {}
    begins, changed, killed, code, longest, slept = [], 0, 0, -1, 0.2, 0.0
    most = len(Path(source).read_text().splitlines()) // (2 * kills)
    while code != 0:
        child = os.fork()
        if child == 0:
            answer(options, source, output)
        if killed < kills:
            slept = source_of_delays.uniform(0.0, longest)
            time.sleep(slept)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        code = 0 if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else -1
        if os.WIFEXITED(status) and code != 0:
            sys.exit(f"the job failed by itself after {killed} kills")
        rows = read_journal(output)
        changed += sum(rows.get(row) != record for row, record in known.items())
        begins.append(len(known))
        # So that about every other try finishes a row, whatever the machine takes to begin, and none so many that the
        # job could end before its kills do.
        if rows and not known:
            longest = slept
        finished = len(rows) - len(known)
        longest *= 0.5 if finished > most else 0.8 if finished else 1.2 if known else 2.0
        known = rows
    print(json.dumps({"killed": killed, "begins": begins, "changed": changed, "rows": len(known)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
