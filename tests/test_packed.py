"""Packed weights on disk: earlier forms of a model's file go when its new one is written, and nothing else does."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import make_tiny_model

from headrace import LLM
from headrace.checkpoint import open_checkpoint
from headrace.engine.loading import PACKING, list_outdated, name_packed
from headrace.quant import FORMATS, packed
from headrace.quant.packed import PackedFile


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files are kept, however small."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "LEAST_BYTES", 0)
    return tmp_path / "cache" / "headrace" / "packed"


def start(model: Path, keep_packed: bool = True) -> None:
    LLM(str(model), precision="int8", kernels="reference", kv_cache_bytes=1 << 22, keep_packed=keep_packed).close()


def make_outdated(model: Path) -> list[Path]:
    paths = list(list_outdated(open_checkpoint(model), "reference"))
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of an earlier version")
    return paths


def test_earlier_forms_go_when_a_new_one_is_written(tmp_path: Path, folder: Path) -> None:
    models = [make_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    mine, others = (make_outdated(model) for model in models)
    assert len({*mine, *others}) == 2 * len(FORMATS) * (PACKING - 1)
    start(models[0], keep_packed=False)
    assert all(path.exists() for path in (*mine, *others))
    start(models[0])
    new = name_packed(open_checkpoint(models[0]), "int8", "reference")
    assert set(folder.iterdir()) == {new, *others}


def test_a_start_that_writes_nothing_removes_nothing(tmp_path: Path, folder: Path) -> None:
    """Two versions that take turns do not make each other pack anew at every start."""
    model = make_tiny_model(tmp_path / "model")
    start(model)
    (new,) = folder.iterdir()
    mine = make_outdated(model)
    start(model)
    assert set(folder.iterdir()) == {new, *mine}


def test_what_killed_starts_have_left_goes_too(tmp_path: Path, folder: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    new = name_packed(open_checkpoint(model), "int8", "reference")
    folder.mkdir(parents=True)
    left = [new.with_name(f"{new.name}.part"), new.with_name(f"{new.name}.0123.part")]
    other = new.with_name("other.safetensors.part")
    for path in (*left, other):
        path.write_bytes(b"half")
    start(model)
    assert set(folder.iterdir()) == {new, other}


def test_starts_at_once_leave_one_whole_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def write(number: int) -> None:
        file = PackedFile(tmp_path / "new")
        file.keep("norm", {"tensor": torch.full((1 << 20,), float(number))})
        file.write()

    for _ in range(3):
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(write, range(4)))
        assert [path.name for path in tmp_path.iterdir()] == ["new"] and not caplog.records
        found = PackedFile(tmp_path / "new").take("norm")
        assert found is not None and found[0]["tensor"].unique().tolist() in ([0.0], [1.0], [2.0], [3.0])


def test_who_has_an_earlier_form_mapped_keeps_it(tmp_path: Path, folder: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    start(model)
    (new,) = folder.iterdir()
    old = list_outdated(open_checkpoint(model), "reference")[0]
    shutil.copy(new, old)
    with safe_open(old, framework="pt") as file:
        names = list(file.keys())
        held = {name: file.get_tensor(name) for name in names}
    new.unlink()
    start(model)
    assert list(folder.iterdir()) == [new]
    with safe_open(new, framework="pt") as file:
        assert all(torch.equal(held[name], file.get_tensor(name)) for name in names)


def test_what_cannot_be_removed_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stuck, plain = tmp_path / "stuck", tmp_path / "plain"
    stuck.mkdir()
    plain.write_text("old")
    file = PackedFile(tmp_path / "new", outdated=(tmp_path / "missing", stuck, plain))
    file.keep("norm", {"tensor": torch.ones(4)})
    file.write()
    assert (tmp_path / "new").exists() and stuck.exists() and not plain.exists() and not caplog.records


def test_a_form_that_could_not_be_written_replaces_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The folder's place is taken by a file."""
    plain = tmp_path / "plain"
    plain.write_text("old")
    file = PackedFile(plain / "new", outdated=(plain,))
    file.keep("norm", {"tensor": torch.ones(4)})
    file.write()
    assert plain.read_text() == "old" and "not kept for the next start" in caplog.text
