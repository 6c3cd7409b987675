"""The oracle: judges any implementation of attention over a paged KV cache against the reference.

Importing this imports no torch; `judge` and `evaluate` bring it in when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .candidate import Candidate, NumericContract
from .case import BatchShape, Case, Spec
from .verdict import Mismatch, Outcome, Verdict

if TYPE_CHECKING:
    from .bound.evaluate import Expected, evaluate
    from .judging import judge

__all__ = [
    "BatchShape",
    "Candidate",
    "Case",
    "Expected",
    "Mismatch",
    "NumericContract",
    "Outcome",
    "Spec",
    "Verdict",
    "evaluate",
    "judge",
]

_LAZY = {"judge": "judging", "evaluate": "bound.evaluate", "Expected": "bound.evaluate"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
