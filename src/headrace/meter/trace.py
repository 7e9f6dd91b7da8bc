"""Write what ran as a Chrome trace: open the file in chrome://tracing or in Perfetto.

The format is the JSON array of complete events of the Trace Event Format; its closing bracket may be missing, so a run
that is killed leaves a file that opens.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


class TraceWriter:
    """See `Listener`. Times are microseconds since the trace began. Raises OSError when the file cannot be written."""

    def __init__(self, path: Path, began: float) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._file.write("[\n")
        self._began = began
        self._first = True

    def hear(self, name: str, start: float, end: float) -> None:
        self.write(name, start, end, {})

    def write(self, name: str, start: float, end: float, details: dict[str, int]) -> None:
        """One event; details show when it is selected."""
        begin, length = 1e6 * (start - self._began), 1e6 * (end - start)
        event = {"name": name, "ph": "X", "pid": os.getpid(), "tid": 1, "ts": round(begin, 1), "dur": round(length, 1)}
        self._file.write("" if self._first else ",\n")
        self._file.write(json.dumps(event | ({"args": details} if details else {})))
        self._first = False

    def close(self) -> None:
        self._file.write("\n]\n")
        self._file.close()
