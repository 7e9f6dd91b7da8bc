"""Headrace: a pile of rows and a model, run at the hardware's limit, nothing lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.core import Constraint, HeadraceError, InputError, ModelError, RowError, SamplingParams
    from headrace.engine.outputs import CompletionOutput, RequestOutput, ScoreOutput
    from headrace.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "Constraint",
    "HeadraceError",
    "InputError",
    "ModelError",
    "RequestOutput",
    "RowError",
    "SamplingParams",
    "ScoreOutput",
    "__version__",
]

# Names are loaded when first asked for: `import headrace` and `headrace --help` must not wait for torch.
_HOMES = {
    "LLM": "headrace.llm",
    "ScoreOutput": "headrace.engine.outputs",
    "RequestOutput": "headrace.engine.outputs",
    "CompletionOutput": "headrace.engine.outputs",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "headrace.core")), name)
