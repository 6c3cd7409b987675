"""Which change of the weights explains an error of one row: a key that is missing, one too many, one misweighed.

A row's output is N / D, N = sum of mass * value and D = sum of mass over what it sees. What it would be with some
keys left out or counted besides follows from N and D alone, so every such suspect is tried: all single keys, all
runs that begin or end where the row's view does, all pages and tiles, and for each key the weight that fits
best. A suspect explains an error if nothing outside of the bound is left, and little at all: what is left is
weighed by the bounds, a matched filter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MISSING, EXTRA, WRONG, SINK, SCALE = DIRECTIONS = (
    "missing key",
    "extra key",
    "wrong weight",
    "wrong sink",  # or what else is in the denominator alone
    "wrong scale",
)

TILES = (16, 32, 64, 128, 256)
_OWN_ERROR = 0.05  # of a change: what a kernel's own rounding may make of it
_LEFT = 0.25  # of the square sum of what was outside of its bound
_ALIKE = 9.0  # what is left may differ by three standard deviations, squared, of its own elements
_TINY = 2.0**-126
_BLOCK = 2**22  # elements of one table of changed outputs


@dataclass(frozen=True)
class Row:
    """One query head of one token, in float64 on the host; L keys that some row of the request may see."""

    keys: Tensor  # [L] int64, ascending
    visible: Tensor  # [L] bool: to this row
    mass: Tensor  # [L]: exp(score - M), also of keys that this row must not see
    sink: Tensor  # []: the sink's mass; 0 without one
    values: Tensor  # [L, Dv]
    error: Tensor  # [Dv + 1]: of the output before its scale, then of lse
    bound: Tensor  # [Dv + 1]: inf where an error says nothing

    @property
    def total(self) -> Tensor:
        return (self.mass * self.visible).sum() + self.sink


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """Keys first..last, whose weight together is not what it should be."""

    direction: str  # one of DIRECTIONS
    first: int
    last: int
    found: float
    expected: float


@dataclass(frozen=True)
class _Changes:
    """H ways to be wrong. Keys first..last by their place in the row; mass and values are what joins N and D."""

    direction: str
    first: Tensor  # [H] int64
    last: Tensor  # [H] int64
    mass: Tensor  # [H]
    values: Tensor  # [H, Dv]


def suspects(row: Row, block_size: int) -> tuple[Suspect, ...]:
    """Those that explain the row's error best and cannot be told apart, the best first.

    Single keys that are missing, too many or counted twice; where none does, runs that are missing or too many.
    """
    if len(row.keys) == 0:
        return ()
    seen, hidden = _Sums(row, row.visible), _Sums(row, ~row.visible)
    return _best(row, _single_keys(seen, hidden)) or _best(row, _runs(row, block_size, seen, hidden))


def misweighed(row: Row) -> tuple[Suspect, ...]:
    """The key that explains the row's error with the weight that fits best, if one does."""
    return _best(row, _fitted_weights(row)) if len(row.keys) else ()


def rescaled(row: Row) -> tuple[str, float] | None:
    """SINK or SCALE and by how much all outputs are too large, if that explains the row's error."""
    inverse = 1 / row.bound[:-1].clamp(min=_TINY)
    output, moved = _output(row) * inverse, row.error[:-1] * inverse
    factor = float(1 + output @ moved / (output @ output).clamp(min=1e-300))
    if not 0 < factor < math.inf:
        return None
    change = torch.cat(((factor - 1) * _output(row), torch.tensor([-math.log(factor)])))
    if _explains(row, change).isfinite():
        return SINK, factor
    change[-1] = 0.0
    return (SCALE, factor) if _explains(row, change).isfinite() else None


class _Sums:
    """Running sums over the keys of one kind, so that a run of them costs one subtraction."""

    def __init__(self, row: Row, chosen: Tensor) -> None:
        mass = row.mass * chosen
        self.chosen = chosen.nonzero().flatten()
        self._mass = torch.nn.functional.pad(mass.cumsum(0), (1, 0))
        self._values = torch.nn.functional.pad((mass[:, None] * row.values).cumsum(0), (0, 0, 1, 0))

    def changes(self, direction: str, first: Tensor, last: Tensor, sign: float) -> _Changes:
        mass, values = (sums[last + 1] - sums[first] for sums in (self._mass, self._values))
        return _Changes(direction, first, last, sign * mass, sign * values)


def _single_keys(seen: _Sums, hidden: _Sums) -> Iterator[_Changes]:
    yield seen.changes(MISSING, seen.chosen, seen.chosen, -1.0)
    yield hidden.changes(EXTRA, hidden.chosen, hidden.chosen, 1.0)
    yield seen.changes(WRONG, seen.chosen, seen.chosen, 1.0)  # counted twice


def _runs(row: Row, block_size: int, seen: _Sums, hidden: _Sums) -> Iterator[_Changes]:
    """Whole pages and tiles; what lies at the ends of the row's view, inside of it and outside."""
    count = len(row.keys)
    start, stop = (int(seen.chosen[0]), int(seen.chosen[-1])) if len(seen.chosen) else (count, count - 1)
    for size in (block_size, *TILES):
        places = torch.unique_consecutive(row.keys // size, return_counts=True)[1].cumsum(0)
        firsts = torch.nn.functional.pad(places[:-1], (1, 0))
        yield seen.changes(MISSING, firsts, places - 1, -1.0)
        yield hidden.changes(EXTRA, firsts, places - 1, 1.0)
    inside = torch.arange(start, max(start, stop))
    yield seen.changes(MISSING, torch.full_like(inside, start), inside, -1.0)
    yield seen.changes(MISSING, inside + 1, torch.full_like(inside, stop), -1.0)
    before, after = torch.arange(start), torch.arange(stop + 1, count)
    yield hidden.changes(EXTRA, before, torch.full_like(before, start - 1), 1.0)
    yield hidden.changes(EXTRA, torch.full_like(after, stop + 1), after, 1.0)


def _fitted_weights(row: Row) -> Iterator[_Changes]:
    """For each key the weight that leaves least of the error: a key of w more moves out by w / (1 + w) * (v - o)."""
    total = row.total
    if float(total) == 0:
        return
    inverse = 1 / row.bound[:-1].clamp(min=_TINY)
    towards = (row.values - _output(row)) * inverse
    share = towards @ (row.error[:-1] * inverse) / (towards * towards).sum(dim=1).clamp(min=1e-300)
    share = share.nan_to_num(0.0).clamp(max=0.999999)
    mass = torch.maximum(share / (1 - share) * total, -row.mass * row.visible)
    places = torch.arange(len(row.keys))
    yield _Changes(WRONG, places, places, mass, mass[:, None] * row.values)


def _output(row: Row) -> Tensor:
    return (row.mass * row.visible) @ row.values / row.total.clamp(min=1e-300)


def _best(row: Row, family: Iterator[_Changes]) -> tuple[Suspect, ...]:
    """Of a family's changes that explain the error those that do it best, the very best first."""
    tried = [(changes, _fits(row, changes)) for changes in family if len(changes.mass)]
    least = min((float(fits.min()) for _, fits in tried), default=math.inf)
    if math.isinf(least):
        return ()
    noise = least / len(row.error)
    alike = [
        (float(fits[place]), _describe(row, changes, place))
        for changes, fits in tried
        for place in (fits <= least + _ALIKE * noise + 1e-9).nonzero().flatten().tolist()
    ]
    return tuple(suspect for _, suspect in sorted(alike, key=lambda pair: pair[0]))


def _fits(row: Row, changes: _Changes) -> Tensor:
    """[H]: the square sum of what a change leaves of the error, in units of the bound; inf where that is too much."""
    step = max(1, _BLOCK // len(row.error))
    parts = torch.split(changes.mass, step), torch.split(changes.values, step)
    return torch.cat([_left(row, mass, values) for mass, values in zip(*parts, strict=True)])


def _left(row: Row, mass: Tensor, values: Tensor) -> Tensor:
    before, output = row.total, _output(row)
    total = (before + mass).clamp(min=0.0)
    total = torch.where(total > 1e-12 * before, total, 0.0)
    moved = torch.where(total[:, None] > 0, (output * before + values) / total[:, None], 0.0) - output
    raised = torch.log(total) - torch.log(before)
    change = torch.cat((moved, raised[:, None]), dim=1)
    return _explains(row, change)


def _explains(row: Row, change: Tensor) -> Tensor:
    """[...]: what is left of the error after a change [..., Dv + 1], as in `_fits`."""
    allowed = row.bound + _OWN_ERROR * change.abs()
    outside = row.error.abs() > row.bound
    outside |= ~outside.any()  # where only all together are too large, all count
    left, error = _squares(row.error - change, allowed), _squares(row.error, row.bound)
    explained = (left <= 1).all(dim=-1)
    explained &= (left * outside).sum(dim=-1) <= _LEFT * (error * outside).sum()
    return torch.where(explained, left.sum(dim=-1), torch.inf)


def _squares(error: Tensor, bound: Tensor) -> Tensor:
    """(error / bound)^2; an infinite bound counts for nothing."""
    units = torch.where((error == 0) | bound.isinf(), 0.0, error / bound.clamp(min=1e-100))
    return units.nan_to_num(torch.inf, posinf=torch.inf).square()


def _describe(row: Row, changes: _Changes, place: int) -> Suspect:
    first, last = int(changes.first[place]), int(changes.last[place])
    own = float((row.mass * row.visible)[first : last + 1].sum())
    total, joined = float(row.total), float(changes.mass[place])
    left = own + joined if changes.direction != MISSING and total + joined > 0 else 0.0
    return Suspect(
        direction=changes.direction,
        first=int(row.keys[first]),
        last=int(row.keys[last]),
        found=left / (total + joined) if left > 0 else 0.0,
        expected=own / total if total > 0 else 0.0,
    )
