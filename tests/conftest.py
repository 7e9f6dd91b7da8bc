"""What all tests share: real data beside the checkout, the real model, tiny random models."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """Path of a file of real data; skips the calling test, saying so, where it is missing."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{path} is missing: this test needs real data beside the checkout")
    return path
