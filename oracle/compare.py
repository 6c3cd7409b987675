"""Outputs against what they should be, element by element.

| output | expected | says |
|---|---|---|
| within the bound, -0 for 0, the same infinity | | agrees |
| finite, outside of the bound | anything | differs |
| NaN or Inf | finite | poisoned; unwritten where the bits are still the ones the output was born with |
| NaN | Inf | differs, or unwritten |
| another dtype or shape | | differs, in words |
| any bit that is not the same (cache pools) | | differs |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .bound.evaluate import Expected
from .building.poison import is_unwritten
from .formats import INTEGERS, name_of
from .locate import locate
from .verdict import Mismatch, Outcome

if TYPE_CHECKING:
    from .building.problem import Problem

Ratios = tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """How one output differs, element by element, on its own device."""

    bad: Tensor  # bool
    ratio: Tensor | None  # float64: |actual - expected| / bound; inf for NaN and where the bound is 0; None for pools


@torch.no_grad()
def compare(actual: dict[str, Tensor], expected: Expected, problem: Problem) -> tuple[tuple[Mismatch, ...], Ratios]:
    """Every output that is not what it should be, and every output's largest error / bound (0 / 0 counts as 0).

    Where everything agrees, one small tensor goes from the device to the host, and nothing else.
    """
    wrong = [mismatch for name in expected.values for mismatch in _form(name, actual, expected)]
    malformed = {mismatch.output for mismatch in wrong}
    names = [name for name in expected.values if name not in malformed]
    differences = {name: _difference(actual[name], expected, name) for name in names}
    summary = _summary(list(differences.values()))
    for name, (count, _) in zip(names, summary, strict=True):
        if count:
            wrong.append(_describe(name, actual[name], expected, differences[name], problem))
    ratios = dict.fromkeys(malformed, float("inf")) | {
        name: ratio for name, (_, ratio) in zip(names, summary, strict=True)
    }
    return tuple(wrong), tuple((name, ratios[name]) for name in expected.values)


def _form(name: str, actual: dict[str, Tensor], expected: Expected) -> list[Mismatch]:
    """What is wrong about the output as a whole: missing, of another shape, of another dtype."""
    shape, dtype = expected.values[name].shape, expected.dtypes[name]
    tensor = actual.get(name)
    if tensor is None:
        words = f"{name} is missing: the outputs are {sorted(actual)}"
    elif tensor.shape != shape:
        words = f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
    elif tensor.dtype != dtype:
        words = f"{name} is {name_of(tensor.dtype)}, expected {name_of(dtype)}"
    else:
        return []
    nan = float("nan")
    total = shape.numel()
    return [
        Mismatch(
            output=name,
            outcome=Outcome.DIFFERS,
            count=total,
            total=total,
            index=(),
            actual=nan,
            expected=nan,
            bound=nan,
            where=words,
            dtype=name_of(dtype),
        )
    ]


def _difference(actual: Tensor, expected: Expected, name: str) -> _Difference:
    value = expected.values[name]
    if expected.exact:
        integers = INTEGERS[actual.element_size()]
        bad = actual.view(integers) != value.view(integers)
        return _Difference(bad=bad, ratio=None)
    wide = actual.double()
    error = torch.where(wide == value, 0.0, (wide - value).abs())  # equal infinities would give NaN
    bound = expected.bounds[name]
    # An infinite error is within an infinite bound only, and then the value has overflowed on its own side.
    within = (error <= bound) & ~(wide.isinf() & (wide.sign() != value.sign()))
    ratio = torch.where((error == 0) | (within & bound.isinf()), 0.0, error / bound)
    return _Difference(bad=~within, ratio=ratio.nan_to_num(nan=torch.inf, posinf=torch.inf))


def _summary(differences: list[_Difference]) -> list[tuple[int, float]]:
    """(bad elements, largest ratio) of each output, in one transfer."""
    if not differences:
        return []
    rows = []
    for difference in differences:
        count = difference.bad.sum().double()
        if difference.ratio is None:
            ratio = torch.where(count > 0, torch.inf, 0.0)
        else:
            ratio = difference.ratio.amax() if difference.bad.numel() else torch.zeros_like(count)
        rows.append(torch.stack((count, ratio.double())))
    return [(int(count), ratio) for count, ratio in torch.stack(rows).tolist()]


def _describe(name: str, actual: Tensor, expected: Expected, difference: _Difference, problem: Problem) -> Mismatch:
    """The output's mismatch, told by the element that is furthest outside of its bound."""
    rows = difference.bad.nonzero()
    places = tuple(rows.T)
    found, due = _take(actual, places), _take(expected.values[name], places)
    bound = torch.zeros_like(found) if expected.exact else expected.bounds[name][places]
    error = torch.where(found == due, 0.0, (found - due).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    ratio = torch.full_like(found, torch.inf) if difference.ratio is None else difference.ratio[places]
    if expected.exact:
        outcome, chosen = Outcome.DIFFERS, torch.ones_like(difference.bad[places])
    else:
        outcome, chosen = _classify(found, due, is_unwritten(actual)[places])
    worst = _first_largest(_first_largest(chosen, ratio), error).nonzero()[0, 0]
    greatest = error.argmax()
    index = _ints(rows[worst])
    return Mismatch(
        output=name,
        outcome=outcome,
        count=len(rows),
        total=actual.numel(),
        index=index,
        actual=float(found[worst]),
        expected=float(due[worst]),
        bound=float(bound[worst]),
        where=locate(problem, name, index),
        dtype=name_of(actual.dtype),
        greatest=float(error[greatest]),
        greatest_index=_ints(rows[greatest]),
        greatest_bound=float(bound[greatest]),
    )


def _classify(found: Tensor, due: Tensor, unwritten: Tensor) -> tuple[Outcome, Tensor]:
    """The gravest thing that is wrong, and the elements of which it is true."""
    if unwritten.any():
        return Outcome.UNWRITTEN, unwritten
    poisoned = ~found.isfinite() & due.isfinite()
    if poisoned.any():
        return Outcome.POISONED, poisoned
    return Outcome.DIFFERS, torch.ones_like(poisoned)


def _first_largest(chosen: Tensor, size: Tensor) -> Tensor:
    """Of the chosen elements those of the largest size."""
    largest = torch.where(chosen, size, -1.0)
    return chosen & (largest == largest.amax())


def _take(tensor: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """The elements at these places as float64; float8 is indexed as bytes, which every device can do."""
    return tensor.view(INTEGERS[tensor.element_size()])[places].view(tensor.dtype).double()


def _ints(index: Tensor) -> tuple[int, ...]:
    return tuple(int(part) for part in index.tolist())
