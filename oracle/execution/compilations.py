"""How often torch really compiled something, by its own count."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Compilations:
    """Counts the graphs that torch's compiler makes while a block of it is open, whoever asked for them."""

    def __init__(self) -> None:
        self.made = 0
        self._before = 0

    def __enter__(self) -> None:
        self._before = _made_so_far()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.made += _made_so_far() - self._before


def _made_so_far() -> int:
    """In this process. The compiler takes a second to import, and whoever has compiled anything has it imported."""
    utils: Any = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else int(utils.counters["stats"]["unique_graphs"])
