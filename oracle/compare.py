"""Outputs against what they should be, element by element.

| output | expected | says |
|---|---|---|
| within the bound, -0 for 0, the same infinity | | agrees |
| finite, outside of the bound | anything | differs |
| NaN or Inf | finite | poisoned; unwritten where the bits are still the ones the output was born with |
| NaN | Inf | differs, or unwritten |
| another dtype or shape | | differs, in words |
| any bit that is not the same (cache pools) | | differs |

Where every hard bound is kept, and roundings are independent, out and lse are held to what that allows as well:
the narrower bounds of `bound/statistics.py`, and the z scores of rows and of the case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .bound.evaluate import Expected
from .bound.statistics import Statistics
from .building.poison import is_unwritten
from .formats import INTEGERS, name_of
from .locate import locate
from .verdict import Mismatch, Outcome
from .z_scores import LIMITS, describe, z_scores

if TYPE_CHECKING:
    from .building.problem import Problem

Ratios = tuple[tuple[str, float], ...]
Check = tuple[str, str]  # output, what it is held to


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """How one output differs, element by element, on its own device; of a z score, row by row."""

    bad: Tensor  # bool
    ratio: Tensor | None = None  # float64: error / bound; inf for NaN and where the bound is 0; None for pools
    error: Tensor | None = None  # float64: |actual - expected|
    bound: Tensor | None = None


@torch.no_grad()
def compare(actual: dict[str, Tensor], expected: Expected, problem: Problem) -> tuple[tuple[Mismatch, ...], Ratios]:
    """Every output that is not what it should be, and every output's largest error / bound (0 / 0 counts as 0).

    Where `expected` has statistics, the ratios go on with "out sub-gaussian", "lse sub-gaussian", and "out row z"
    and "out case z" if there are any: the same for the narrower bounds, and the largest z.
    Where everything agrees, one small tensor goes from the device to the host, and nothing else.
    """
    wrong = [mismatch for name in expected.values for mismatch in _form(name, actual, expected)]
    malformed = {mismatch.output for mismatch in wrong}
    names = [name for name in expected.values if name not in malformed]
    differences: dict[Check, _Difference] = {
        (name, "bound"): _difference(actual[name], expected, name) for name in names
    }
    if expected.statistics is not None and not malformed:
        differences |= _statistical(differences, expected.statistics)
    summary = dict(zip(differences, _summary(list(differences.values())), strict=True))
    failed = [key for key, (count, _) in summary.items() if count]
    # Statistics say what a hard bound cannot, and nothing more where one is broken.
    for key in [key for key in failed if key[1] == "bound"] or failed:
        wrong.append(_describe(key, actual, expected, differences[key], problem))
    return tuple(wrong), _ratios(expected, {key: ratio for key, (_, ratio) in summary.items()})


def _statistical(hard: dict[Check, _Difference], statistics: Statistics) -> dict[Check, _Difference]:
    """The same errors held to what independent roundings allow."""
    found: dict[Check, _Difference] = {}
    for name, bound in statistics.bounds.items():
        error = hard[name, "bound"].error
        assert error is not None
        ratio = torch.where((error == 0) | bound.isinf(), 0.0, error / bound)
        found[name, "sub-gaussian"] = _Difference(bad=~(error <= bound), ratio=ratio, error=error, bound=bound)
        if name == "out":
            scores = z_scores(error, statistics)
            for check, z in (("row z", scores.rows), ("case z", scores.case)):
                found[name, check] = _Difference(bad=z > LIMITS[check], ratio=z)
    return found


def _ratios(expected: Expected, found: dict[Check, float]) -> Ratios:
    """Of every output that is expected, inf for what has another form; then of what else it was held to."""
    plain = [(name, found.get((name, "bound"), float("inf"))) for name in expected.values]
    others = [(f"{name} {check}", ratio) for (name, check), ratio in found.items() if check != "bound"]
    return *plain, *((label, ratio) for label, ratio in others if ratio > 0 or not label.endswith(" z"))


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
        return _Difference(bad=bad)
    wide = actual.double()
    error = torch.where(wide == value, 0.0, (wide - value).abs())  # equal infinities would give NaN
    bound = expected.bounds[name]
    # An infinite error is within an infinite bound only, and then the value has overflowed on its own side.
    within = (error <= bound) & ~(wide.isinf() & (wide.sign() != value.sign()))
    ratio = torch.where((error == 0) | (within & bound.isinf()), 0.0, error / bound)
    ratio = ratio.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return _Difference(bad=~within, ratio=ratio, error=error, bound=bound)


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


def _describe(
    key: Check, outputs: dict[str, Tensor], expected: Expected, difference: _Difference, problem: Problem
) -> Mismatch:
    """The output's mismatch, told by the element (of a z score, the row) that is furthest outside of its bound."""
    name, check = key
    actual = outputs[name]
    if check in LIMITS and difference.ratio is not None:
        return describe(check, difference.ratio, actual, problem)
    rows = difference.bad.nonzero()
    places = tuple(rows.T)
    found, due = _take(actual, places), _take(expected.values[name], places)
    bound = torch.zeros_like(found) if difference.bound is None else difference.bound[places]
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
        check=check,
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
