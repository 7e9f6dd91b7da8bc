"""A real server for tests: `headrace serve` in a process of its own, on a free port."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

FLAGS = ("--precision", "fp32", "--block-size", "16", "--threads", "1", "--kv-cache-bytes", "16MiB", "--port", "0")


class RunningServer:
    """A server that has said where it listens. `log` grows with what it writes to standard error."""

    def __init__(self, model: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "headrace", "serve", "--model", str(model), *FLAGS, *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        assert self.process.stderr is not None and self.process.stdout is not None
        threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True).start()
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            self.process.wait(10)
            raise RuntimeError(f"the server did not start: {line}{''.join(self.log)}")
        self.url = found[0]

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal the server and wait for its end; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def serving(model: Path, *flags: str) -> Iterator[RunningServer]:
    server = RunningServer(model, *flags)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
