"""Operators that may only run between the segments of a capture, never inside of one."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from .errors import CaptureError


class RequiredBreaks(TorchDispatchMode):
    """Refuses operators that a segment would freeze, such as attention over the metadata of one step.

    It sees what the captured code calls, not what the body of another registered operator calls in turn.
    """

    def __init__(self, names: Collection[str]) -> None:
        """`names` are "namespace::operator". Raises ValueError for one that is not registered: it would never match."""
        super().__init__()  # type: ignore[no-untyped-call]
        for name in names:
            space, _, operator = name.partition("::")
            if not operator or not hasattr(getattr(torch.ops, space), operator):
                raise ValueError(f"must_break: found {name!r}, expected a registered operator, as namespace::operator")
        self._names = frozenset(names)
        self._scope = contextlib.ExitStack()
        self._started = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in self._names:
            raise CaptureError(
                f"{func._schema.name}: captured without its break; every replay would run it on the metadata of the "
                "capture. Decorate what calls it with eager_break"
            )
        return func(*args, **(kwargs or {}))

    def start(self) -> None:
        if self._names:
            self._scope.enter_context(self)
            self._started = True

    def stop(self) -> None:
        if not self._started:
            return
        if _get_current_dispatch_mode() is not self:
            raise CaptureError("a segment ends inside of an operator, or of a dispatch mode entered after it began")
        self._started = False
        self._scope.close()
