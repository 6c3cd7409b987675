"""The decorator of functions that break a capture."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, overload

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


class Breakable(Protocol):
    """A capture under way that a call can break."""

    def run_between(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """End the segment, call `function` for real, and open the next segment."""


class Thread(threading.local):
    """What one thread captures."""

    graph: Breakable | None = None  # None also while a call between two segments runs


thread = Thread()


@overload
def eager_break(function: Callable[Parameters, Returned], /) -> Callable[Parameters, Returned]: ...


@overload
def eager_break(*, name: str) -> Callable[[Callable[Parameters, Returned]], Callable[Parameters, Returned]]: ...


def eager_break(function: Any = None, /, *, name: str | None = None) -> Any:
    """Make a function or method break the breakable capture that its thread is in; elsewhere it is just called.

    `name` is what errors call it. Inside of another broken function, of a plain capture and of a warm-up it is just
    called too. Raises TypeError for a coroutine or generator function, whose call does nothing yet.
    """
    if function is None:
        return functools.partial(eager_break, name=name)
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(f"eager_break: found {function!r}, expected a function whose call does its work")
    label = str(name or getattr(function, "__qualname__", function))

    @functools.wraps(function)
    def broken(*args: Any, **kwargs: Any) -> Any:
        graph = thread.graph
        if graph is None:
            return function(*args, **kwargs)
        return graph.run_between(label, function, args, kwargs)

    return broken
