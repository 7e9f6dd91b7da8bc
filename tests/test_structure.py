"""The house rules that a machine can check: import directions, no cycles, sizes, types, forbidden names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from structure import (
    Module,
    check_cycles,
    check_directions,
    check_forbidden,
    check_sizes,
    check_tensors,
    check_types,
    read_package,
    without_torch,
)

ROOT = Path(__file__).resolve().parents[1]
MODULES = read_package(ROOT / "src" / "headrace")
EACH: list[Callable[[Module], list[str]]] = [check_directions, check_sizes, check_types, check_forbidden]


def test_the_package_was_found() -> None:
    rooms = {module.room for module in MODULES}
    assert {"core", "options", "schedule", "cache", "model", "engine", "llm", "job", "cli"} <= rooms


@pytest.mark.parametrize("check", EACH, ids=lambda check: check.__name__)
def test_modules(check: Callable[[Module], list[str]]) -> None:
    faults = [fault for module in MODULES for fault in check(module)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("check", [check_cycles, check_tensors], ids=lambda check: check.__name__)
def test_package(check: Callable[[list[Module]], list[str]]) -> None:
    faults = check(MODULES)
    assert not faults, "\n".join(faults)


def test_bookkeeping_loads_without_torch() -> None:
    names = [f"headrace.{module.name}" for module in MODULES if without_torch(module.name)]
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def snippet(name: str, text: str) -> Module:
    known = frozenset(module.name for module in MODULES) | {name, "checkpoint.base", "checkpoint.gguf"}
    return Module(name, text, known=known)


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("engine.bad", "from headrace.llm import LLM", "engine.bad must not import llm"),
        ("engine.bad", "import headrace.job", "engine.bad must not import job"),
        ("engine.bad", "from headrace import job", "engine.bad must not import job"),
        ("engine.bad", "from headrace import LLM", "engine.bad must not import headrace"),
        ("schedule.bad", "from headrace.model import load_model", "schedule.bad must not import model"),
        ("quant.bad", "from headrace.cache import layout", "quant.bad must not import cache"),
        ("kernels.bad", "from headrace.cache import layout", "kernels.bad must not import cache"),
        ("meter.bad", "from headrace.kernels import base", "meter.bad must not import kernels"),
        ("core", "from headrace.options import EngineOptions", "core must not import options"),
        ("model.bad", "from headrace.checkpoint.gguf import x", "model.bad must not import checkpoint"),
        ("engine.bad", "from . import batch", "relative import"),
        ("engine.bad", "def f() -> None:\n    import json", "import of json inside a function"),
        ("attic.bad", "", "room 'attic' is not in the design"),
    ],
)
def test_directions_can_fail(name: str, text: str, fault: str) -> None:
    assert fault in "\n".join(check_directions(snippet(name, text)))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("engine.good", "from headrace.schedule import base\nfrom headrace.core import Request"),
        ("model.good", "from headrace.checkpoint.base import Checkpoint"),
        ("cli.good", "def f() -> None:\n    from headrace.job import run"),
        ("checkpoint.good", "def f() -> None:\n    import huggingface_hub"),
    ],
)
def test_directions_can_pass(name: str, text: str) -> None:
    assert check_directions(snippet(name, text)) == []


def test_cycles_can_fail() -> None:
    known = frozenset({"engine.a", "engine.b"})
    first = Module("engine.a", "from headrace.engine.b import x", known=known)
    second = Module("engine.b", "def f() -> None:\n    import headrace.engine.a", known=known)
    assert len(check_cycles([first, second])) == 2
    assert check_cycles([first]) == []


@pytest.mark.parametrize("middle", ["import torch", "from numpy import array", "if True:\n    import torch.nn"])
def test_tensors_can_fail(middle: str) -> None:
    known = frozenset({"schedule.a", "engine.b"})
    start = Module("schedule.a", "from headrace.engine.b import x", known=known)
    assert len(check_tensors([start, Module("engine.b", middle, known=known)])) == 1
    assert len(check_tensors([Module("core", middle)])) == 1
    assert check_tensors([start, Module("engine.b", "import math", known=known)]) == []


def test_a_package_that_loads_torch_counts_for_its_modules() -> None:
    known = frozenset({"cache", "cache.blocks"})
    package = Module("cache", "import torch", package=True, known=known)
    assert check_tensors([package, Module("cache.blocks", "", known=known)])


def body(count: int, line: str) -> str:
    return "".join(line.format(number) for number in range(count))


@pytest.mark.parametrize(
    ("name", "text", "faults"),
    [
        ("job.a", "x = 1\n" * 300, 0),
        ("job.a", "x = 1\n" * 301, 1),
        ("core", "x = 1\n" * 201, 1),
        ("job.a", "def f() -> None:\n" + "    x = 1\n" * 49, 0),
        ("job.a", "def f() -> None:\n" + "    x = 1\n" * 50, 1),
        ("job.a", f"class C:\n    def f(self, {body(7, 'a{}, ')}): ...", 0),
        ("job.a", f"def f({body(6, 'a{}, ')} *, b, **c): ...", 1),
        ("job.a", "class C:\n    def f(self):\n" + body(12, "        self.a{} = 1\n"), 0),
        ("job.a", "class C:\n    def f(self):\n" + body(13, "        self.a{} = 1\n"), 1),
        ("job.a", "class C:\n    def f(self):\n        " + body(13, "self.a{}, ") + " = x", 1),
        ("job.a", "@dataclass\nclass C:\n" + body(13, "    a{}: int\n"), 1),
        ("job.a", "@dataclass(frozen=True)\nclass C:\n" + body(13, "    a{}: int\n"), 0),
        ("job.a", "class C(Struct, frozen=True):\n" + body(13, "    a{}: int\n"), 0),
    ],
)
def test_sizes_can_fail(name: str, text: str, faults: int) -> None:
    assert len(check_sizes(snippet(name, text))) == faults


@pytest.mark.parametrize(
    "text",
    ["def f(a) -> None: ...", "def f(a: int): ...", "def f(*a) -> None: ...", "class C:\n    async def f(self): ..."],
)
def test_types_can_fail(text: str) -> None:
    assert len(check_types(snippet("job.a", text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import os\nx = os.environ['A']",
        "from os import environ",
        "import os\nos.getenv('A')",
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
    ],
)
def test_forbidden_can_fail(text: str) -> None:
    assert check_forbidden(snippet("job.a", text))
    assert check_forbidden(snippet("job.a", "import os\nimport torch\ntorch.zeros(1)\nos.path")) == []
