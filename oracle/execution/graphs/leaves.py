"""Values in lists, tuples and dicts, as operators take and return them; torch's own tree functions cost far more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def leaves(value: Any) -> Iterator[Any]:
    """What lies inside of lists, tuples and the values of dicts, in order."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    else:
        yield value


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """The same lists, tuples (named ones too) and dicts around changed leaves."""
    if isinstance(value, tuple):
        parts = [map_leaves(change, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [map_leaves(change, part) for part in value]
    if isinstance(value, dict):
        return {name: map_leaves(change, part) for name, part in value.items()}
    return change(value)
