"""Write what ran as a Chrome trace: open the file in chrome://tracing or in Perfetto.

The format is the JSON array of complete events of the Trace Event Format; its closing bracket may be missing, so a run
that is killed leaves a file that opens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class TraceWriter:
    """See `Listener`. Times are microseconds since the trace began. Raises OSError when the file cannot be opened;
    one that fails later ends there, and `tell` hears why: what is traced goes on."""

    def __init__(self, path: Path, began: float, tell: Callable[[str], None]) -> None:
        self._path = path
        self._file = path.open("w", encoding="utf-8")
        self._began = began
        self._tell = tell
        self._put("[\n")
        self._first = True

    def hear(self, name: str, start: float, end: float) -> None:
        self.write(name, start, end, {})

    def write(self, name: str, start: float, end: float, details: dict[str, int]) -> None:
        """One event; details show when it is selected."""
        begin, length = 1e6 * (start - self._began), 1e6 * (end - start)
        event = {"name": name, "ph": "X", "pid": os.getpid(), "tid": 1, "ts": round(begin, 1), "dur": round(length, 1)}
        separator = "" if self._first else ",\n"
        self._put(separator + json.dumps(event | ({"args": details} if details else {})))
        self._first = False

    def close(self) -> None:
        self._put("\n]\n", last=True)

    def _put(self, text: str, last: bool = False) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(text)
            if last:
                self._file.close()
        except OSError as error:
            # Closing tries once more to write what is left.
            with suppress(OSError):
                self._file.close()
            self._tell(f"the trace {self._path} ends here: {str(error.strerror).lower()}; all else goes on")
