"""Answer the batches of a data folder, killed with SIGKILL at random instants, until they are done. A whole program.

Each try is a fork of this process, which has loaded the code but computed nothing. Prints a JSON object: how often it
was killed, how many finished rows the journals had at each kill, and how many of those were lost or changed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from batch_app import answer_batches
from jobs import read_journal


def answer(folder: Path, model: Path) -> None:
    """In the fork: a server's batches, and nothing of the parent's ending."""
    code = 1
    try:
        answer_batches(folder, model, max_sequences=6)
        code = 0
    finally:
        os._exit(code)


def read_journals(folder: Path) -> dict[tuple[str, int], bytes]:
    """The finished rows of all batches that are not ended."""
    journals = sorted((folder / "batches").glob("*.journal"))
    return {(path.stem, row): record for path in journals for row, record in read_journal(path.with_suffix("")).items()}


def main(folder: Path, model: Path, kills: int) -> None:
    delays = random.Random(11)
    known: dict[tuple[str, int], bytes] = {}
    begins, lost, killed, code, longest, slept = [], 0, 0, -1, 0.5, 0.0
    while code != 0:
        child = os.fork()
        if child == 0:
            answer(folder, model)
        if killed < kills:
            slept = delays.uniform(0.0, longest)
            time.sleep(slept)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        code = 0 if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else -1
        if os.WIFEXITED(status) and code != 0:
            sys.exit(f"the batches failed by themselves after {killed} kills")
        rows = read_journals(folder)
        # The journal of a batch goes when the batch has ended.
        going = {name for name, _ in rows}
        lost += sum(rows.get(row) != record for row, record in known.items() if row[0] in going)
        # So that about every fourth try finishes a row, whatever the machine takes to begin: on a fast one all would be
        # done before the last kill.
        if rows and not any(begins):
            longest = slept
        longest *= 0.6 if rows.keys() != known.keys() else 1.2 if any(begins) else 2.0
        begins.append(len(rows))
        known = rows
    print(json.dumps({"killed": killed, "begins": begins, "lost": lost}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
