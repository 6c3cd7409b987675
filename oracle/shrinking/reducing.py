"""The three ways to make something smaller.

Each is a generator: it yields a case to try, is sent whether that case still fails, and returns what it came to.
The last case that still failed is the one that stands for what is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TypeVar

from ..case import Case

T = TypeVar("T")
Trials = Generator[Case, bool, T]


def fewest(items: Sequence[T], case_with: Callable[[Sequence[T]], Case]) -> Trials[list[T]]:
    """As few of the items as still fail, in their order: first all are left out at once, then ever smaller runs."""
    kept = list(items)
    size = len(kept)
    while size:
        start = 0
        while start < len(kept):
            fewer = kept[:start] + kept[start + size :]
            if (yield case_with(fewer)):
                kept = fewer
            else:
                start += size
        size = min(size // 2, len(kept))
    return kept


def first_of(values: Iterable[T], otherwise: T, case_with: Callable[[T], Case]) -> Trials[T]:
    """The first of the values with which it still fails, or else what it is now."""
    for value in values:
        if (yield case_with(value)):
            return value
    return otherwise


def lowest(value: int, steps: Iterable[int], case_with: Callable[[int], Case]) -> Trials[int]:
    """The lowest of the steps below `value` with which it still fails; then, by halving, numbers between two steps."""
    below: int | None = None  # does not fail, as far as is known
    for step in sorted({step for step in steps if step < value}):
        if (yield case_with(step)):
            value = step
            break
        below = step
    if below is None:
        return value
    while value - below > 1:
        middle = (below + value) // 2
        if (yield case_with(middle)):
            value = middle
        else:
            below = middle
    return value
