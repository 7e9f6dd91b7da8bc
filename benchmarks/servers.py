"""A server in a process of its own: started from a command, waited for, stopped. Knows no engine's options.

In the command {port} stands for a free port and {folder} for an empty folder that is removed at the end.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

# Seconds that a server may take to answer at first, and to end.
START, END = 600.0, 40.0


class Server:
    """A server that answers. `log` is the file of all that it prints."""

    def __init__(self, name: str, command: str, folder: Path) -> None:
        self.name = name
        self.log = folder / "log"
        port = find_port()
        self.url = f"http://127.0.0.1:{port}"
        data = folder / "data"
        data.mkdir()
        words = [word.replace("{port}", str(port)).replace("{folder}", str(data)) for word in shlex.split(command)]
        began = time.monotonic()
        with self.log.open("wb") as log:
            # In a session of its own, so that its workers are stopped with it.
            self.process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        try:
            self._wait()
            self.start_seconds = time.monotonic() - began
            self.model = self._find_model()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> int:
        """Its exit code; a server that does not end is killed."""
        if self.process.returncode is not None:
            return self.process.returncode
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START
        # One client: to make one takes more time than to ask.
        with httpx.Client(base_url=self.url, timeout=5) as client:
            while time.monotonic() < deadline:
                if any(answers(client, path) for path in ("/health", "/v1/models")):
                    return
                if self.process.poll() is not None:
                    raise SystemExit(f"{self.name} ended with code {self.process.returncode}:\n{self._last_lines()}")
                time.sleep(0.2)
        raise SystemExit(f"{self.name} did not answer within {START:.0f} s:\n{self._last_lines()}")

    def _find_model(self) -> str:
        return str(httpx.get(f"{self.url}/v1/models", timeout=60).raise_for_status().json()["data"][0]["id"])

    def _last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


def answers(client: httpx.Client, path: str) -> bool:
    with suppress(httpx.HTTPError):
        return client.get(path).status_code == 200
    return False


@contextmanager
def serving(name: str, command: str) -> Iterator[Server]:
    """A server for as long as the block lasts, also where that is ended by SIGTERM."""
    signal.signal(signal.SIGTERM, leave)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        server = Server(name, command, Path(folder))
        try:
            yield server
        finally:
            server.stop()


def leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
