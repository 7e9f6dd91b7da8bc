"""What all tests share: real data beside the checkout, the real model, tiny random models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import RunningServer, serving
from tiny import make_tiny_model

from headrace.checkpoint.sources import pull

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """Path of a file of real data; skips the calling test, saying so, where it is missing."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{path} is missing: this test needs real data beside the checkout")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with a chat template."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real SmolLM2-135M-Instruct as a .gguf file, pulled if it is missing."""
    return pull("smollm2-135m")


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """The real Gemma 3 270M base model as a .gguf file, pulled if it is missing."""
    return pull("gemma3-270m")


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A real server of the tiny model, in a process of its own."""
    with serving(tiny_model, "--data", str(tmp_path_factory.mktemp("data"))) as running:
        yield running
