"""Which boundary events, and which pairs of them within one request, can happen; and which did.

What can happen is enumerated, not argued: requests whose context, length, window edge and new tokens lie at and beside
the first multiples of every page, tile and split, alone and in all combinations of two, with windows, biases and shared
pages at every edge. An event or a pair is reachable if one of these requests has it, and so has a witness.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..case import Case
from .events import (
    CASE_NAMES,
    NAMES,
    NONE,
    UNLIMITED,
    Bools,
    Requests,
    occurs,
    of_case,
    of_whole_case,
)
from .traits import TILES

_FEW_TOKENS = (1, 2, 3, 5, 14, 15, 16, 17, 18, 21, 31, 32, 33, 63, 64, 65, 127, 128, 129)
_NO_CHANGE = (UNLIMITED, NONE, NONE)  # right window, bias, shared keys


def _together(found: Bools) -> Bools:
    """[events, events]: which hold for one request, from `occurs`."""
    as_numbers = found.astype(np.float32)
    return np.asarray(as_numbers @ as_numbers.T > 0)


@dataclass(eq=False)
class EventCounter:
    """Cases for every event, and which events one request had together. Merges, and travels between processes."""

    cases: Counter[str] = field(default_factory=Counter)
    together: Bools = field(default_factory=lambda: np.zeros((len(NAMES), len(NAMES)), dtype=np.bool_))

    def add(self, case: Case, split: int = NONE) -> None:
        """Count a case; `split`: keys of a split in the candidate's plan of it."""
        self.cases.update(of_whole_case(case))
        found = of_case(case, split)
        if found is not None:
            self.cases.update(NAMES[index] for index in np.flatnonzero(found.any(axis=1)))
            self.together |= _together(found)

    def merge(self, other: EventCounter) -> None:
        self.cases.update(other.cases)
        self.together |= other.together

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EventCounter):
            return NotImplemented
        return self.cases == other.cases and np.array_equal(self.together, other.together)


@dataclass(frozen=True)
class Reachable:
    """What can happen within given sizes."""

    events: tuple[str, ...]
    together: Bools  # [events, events], each pair once: the second event before the first in `NAMES`

    @property
    def num_pairs(self) -> int:
        return int(self.together.sum())

    def missing_events(self, counter: EventCounter) -> list[str]:
        return [name for name in self.events if not counter.cases[name]]

    def missing_pairs(self, counter: EventCounter) -> list[tuple[str, str]]:
        return [(NAMES[a], NAMES[b]) for a, b in np.argwhere(self.together & ~counter.together)]


@functools.cache
def reachable(pages: tuple[int, ...], tokens: int, keys: int, split: int = NONE) -> Reachable:
    """The events of requests with at most so many new tokens and keys, on pages of these sizes.

    split: the keys of the shortest split of the candidate; it may take two or four times as many. `NONE`: it does not
    say where it splits, and events of splits are left out.
    """
    together = np.zeros((len(NAMES), len(NAMES)), dtype=np.bool_)
    longer = [(page, split * times) for page in pages[len(pages) // 2 :][:1] for times in (2, 4) if split != NONE]
    for page, width in [*((page, split) for page in pages), *longer]:
        together |= _together(occurs(_world(page, width, tokens, keys)))
    events = tuple(name for name, happens in zip(NAMES, np.diagonal(together), strict=True) if happens)
    return Reachable(events=(*events, *CASE_NAMES), together=np.tril(together, -1))


def _world(page: int, split: int, tokens: int, keys: int) -> Requests:
    """The requests that are looked at, see the module's docstring."""
    edges = _edges(page, split, keys)
    columns = np.array(
        [(n, length, window, *change) for n, length, window, change in _requests(page, edges, tokens, keys)],
        dtype=np.int64,
    ).T
    n, length, window, right, bias, shared = columns
    return Requests(
        new_tokens=n, seq_lens=length, page=page, split=split, window=window, right_window=right, bias_width=bias,
        shared_keys=shared,
    )  # fmt: skip


def _edges(page: int, split: int, keys: int) -> list[int]:
    """Numbers at and beside the multiples of everything that lengths can meet, and a few in between."""
    units = {unit for unit in (page, *TILES, split) if unit != NONE}
    multiples = {multiple for unit in units for multiple in range(unit, max(3 * unit, max(TILES)) + 1, unit)}
    multiples |= {math.lcm(a, b) for a in units for b in units}
    near = {multiple + delta for multiple in multiples for delta in (-1, 0, 1)}
    return sorted(value for value in {1, 2, 5, 21, *near} if 0 < value <= keys)


Change = tuple[int, int, int]  # right window, bias width, shared keys
Request = tuple[int, int, int, Change]  # new tokens, keys, window, change


def _requests(page: int, edges: list[int], tokens: int, keys: int) -> Iterator[Request]:
    yield from ((0, length, NONE, _NO_CHANGE) for length in (0, 1, *edges))
    yield from _hanging_over(page, [n for n in (*_FEW_TOKENS, *edges) if n <= tokens])
    for context, length in _spans(page, edges, tokens, keys):
        n = length - context
        yield from ((n, length, window, _NO_CHANGE) for window in _windows(context, length))
        for window in _windows(context, length) if context in (0, 1, 16, 21) else [NONE]:
            yield from ((n, length, window, change) for change in _changes(page, n, length))
    for n in (n for n in _FEW_TOKENS if n <= tokens):
        yield from (request for request in _windowed(page, edges, n) if request[1] <= keys)


def _hanging_over(page: int, tokens: list[int]) -> Iterator[Request]:
    """Requests with more new tokens than keys."""
    for n in tokens:
        for length in (0, 1, n - 1, n // 2):
            for window in (NONE, *{max(1, width) for width in (length - 1, length, length + 1, n, n + 1)}):
                yield from ((n, length, window, change) for change in _changes(page, n, length))


def _windowed(page: int, edges: list[int], n: int) -> Iterator[Request]:
    """Requests of n new tokens whose window's edge, for the first of them, is each of the edges."""
    for edge in edges:
        contexts = {edge}
        if n in (1, 2, 5, 17):
            contexts |= {context - back for context in edges for back in (0, n)}
        for context in contexts:
            if context >= edge:
                yield n, context + n, context - edge + 1, _NO_CHANGE
        for context in (context for context in (edge, edge + 16, 2 * page - n) if context >= edge):
            changes = _changes(page, n, context + n)
            yield from ((n, context + n, context - edge + 1, change) for change in changes)


def _spans(page: int, edges: list[int], tokens: int, keys: int) -> list[tuple[int, int]]:
    """(context, keys) of requests: every two edges, and a few lengths of new tokens after and before each."""
    spans = {(a, b) for a in (0, *edges) for b in edges if a < b}
    spans |= {(a, a + n) for a in (0, *edges) for n in _FEW_TOKENS}
    spans |= {(b - n, b) for b in edges for n in _FEW_TOKENS if n <= b}
    within = {(context, length) for context, length in spans if length - context <= tokens}
    # Pages that are shared or repeated are filled whatever the limits: a prefill then has as many tokens, or one more.
    within |= {(0, length) for length in (page, page + 1, 2 * page)}
    return sorted((context, length) for context, length in within if length <= keys)


def _windows(context: int, length: int) -> list[int]:
    """No window, and those about the lengths."""
    n = length - context
    widths = {1, context - 1, context, context + 1, length - 1, length, length + 1, length + 100, n - 1, n, n + 1}
    return [NONE, *sorted(width for width in widths if width >= 1)]


def _changes(page: int, n: int, length: int) -> list[Change]:
    """One thing more, or two: right windows, biases and shared pages at their edges."""
    rights = [UNLIMITED, *(value for value in (0, n - 2, n - 1, n) if value >= 0)]
    biases = [NONE, *(value for value in (n - 1, n, n + 1) if value > 0)]
    shared = [NONE, *(value for value in (page, 2 * page) if value <= length)]
    if n in (1, 2, 17):
        return [(right, bias, value) for right in rights for bias in biases for value in shared]
    alone = [(right, NONE, NONE) for right in rights] + [(UNLIMITED, bias, NONE) for bias in biases]
    return alone + [(UNLIMITED, NONE, value) for value in shared]
