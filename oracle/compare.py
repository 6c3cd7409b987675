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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .bound.evaluate import Expected
from .bound.statistics import Statistics
from .building.poison import is_unwritten
from .formats import INTEGERS, name_of
from .locate import locate
from .verdict import Mismatch, Outcome
from .z_scores import CASE_Z, LIMITS, ROW_Z, SUB_GAUSSIAN, describe, z_scores

if TYPE_CHECKING:
    from .building.problem import Problem

Ratios = tuple[tuple[str, float], ...]
Check = tuple[str, str]  # output, what it is held to


_SMALLEST = 2.0**-1000  # stands for a bound of 0: no difference of two outputs is as small


@dataclass(frozen=True, kw_only=True)
class _Errors:
    """How far one output is off, on its own device, and one number that says whether to look closer."""

    ratio: Tensor  # float64: at most 1 where an element agrees; above, or NaN, where it is not that simple
    error: Tensor | None = None  # float64: |actual - expected|; None for pools, which are compared bit by bit


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """How one output differs, element by element."""

    bad: Tensor  # bool
    ratio: Tensor | None = None  # float64: error / bound; inf for NaN and where the bound is 0; None for pools
    bound: Tensor | None = None


@torch.no_grad()
def ratios_by_case(actual: dict[str, Tensor], expected: Expected, num_tokens: Sequence[int]) -> list[Ratios | None]:
    """Of cases whose rows lie one after the other: the ratios of `compare` if it would find nothing wrong.

    None: that case has to be looked at alone. num_tokens: the rows of each. One small tensor goes from the device to
    the host, and nothing else.
    """
    if any(_form(name, actual, expected) for name in expected.values):
        return [None] * len(num_tokens)
    errors = {name: _errors(actual[name], expected, name) for name in expected.values}
    scores = {} if expected.statistics is None else _scores(errors, expected.statistics)
    found = _largest_by_case([*(output.ratio for output in errors.values()), *scores.values()], num_tokens)
    outputs = len(errors)
    return [
        _if_right(dict(zip(errors, case[:outputs], strict=True)), dict(zip(scores, case[outputs:], strict=True)))
        for case in found
    ]


@torch.no_grad()
def ratios_of_caches(pairs: Sequence[tuple[Mapping[str, Tensor], Expected]]) -> list[Ratios | None]:
    """The same of (pools as they are, what they should be), one after the other; also in one transfer."""
    flags = [
        torch.stack([_errors(actual[name], expected, name).ratio for name in expected.values])
        for actual, expected in pairs
    ]
    found = torch.stack(flags).tolist()
    return [
        _if_right(dict(zip(expected.values, case, strict=True)), {})
        for (_, expected), case in zip(pairs, found, strict=True)
    ]


def _if_right(ratios: dict[str, float], largest: dict[Check, float]) -> Ratios | None:
    right = all(ratio <= 1 for ratio in ratios.values()) and all(
        largest[check] <= LIMITS[check[1]] for check in largest
    )
    return _named(ratios, largest) if right else None


def _largest_by_case(ratios: Sequence[Tensor], num_tokens: Sequence[int]) -> list[list[float]]:
    """Of each case the largest of each; NaN as infinity. Those of one dimension have a number for each case already."""
    if sum(num_tokens) == 0:
        return [[0.0] * len(ratios) for _ in num_tokens]
    rows = torch.stack([each.flatten(1).amax(dim=1) for each in ratios if each.dim() > 1]).nan_to_num_(nan=torch.inf)
    case_of_row = torch.from_numpy(np.repeat(np.arange(len(num_tokens)), num_tokens)).to(rows.device, non_blocking=True)
    cases = rows.new_zeros(len(rows), len(num_tokens))
    of_rows = iter(cases.scatter_reduce_(1, case_of_row.expand_as(rows), rows, "amax"))
    found = torch.stack([next(of_rows) if each.dim() > 1 else each for each in ratios])
    numbers: list[list[float]] = found.T.tolist()
    return numbers


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
    errors = {name: _errors(actual[name], expected, name) for name in names}
    statistics = expected.statistics if not malformed else None
    scores = {} if statistics is None else _scores(errors, statistics)
    ratios, largest = _summary(errors, scores)
    for name in names:
        if not ratios[name] <= 1:
            difference = _difference(actual[name], expected, name)
            ratios[name] = float("inf") if difference.ratio is None else float(difference.ratio.amax())
            if bool(difference.bad.any()):
                wrong.append(_describe(name, actual[name], expected, difference, problem))
    if not wrong and statistics is not None:  # where a hard bound is broken they say nothing more
        for check, score in scores.items():
            if largest[check] > LIMITS[check[1]]:
                wrong.append(_describe_score(check, score, actual, expected, problem))
    return tuple(wrong), _named({name: ratios.get(name, float("inf")) for name in expected.values}, largest)


def _named(ratios: dict[str, float], largest: dict[Check, float]) -> Ratios:
    # A z of 0 is that of too few errors.
    others = [(" ".join(check), score) for check, score in largest.items() if score > 0 or check[1] == SUB_GAUSSIAN]
    return (*ratios.items(), *others)


def _scores(errors: dict[str, _Errors], statistics: Statistics) -> dict[Check, Tensor]:
    """What must stay below `LIMITS`: the same errors in units of what independent roundings allow, or expect."""
    scores: dict[Check, Tensor] = {}
    for name, bound in statistics.bounds.items():
        error = errors[name].error
        assert error is not None
        scores[name, SUB_GAUSSIAN] = error / bound.clamp(min=_SMALLEST)
        if name == "out":
            scores[name, ROW_Z], scores[name, CASE_Z] = z_scores(error, statistics)
    return scores


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


def _errors(actual: Tensor, expected: Expected, name: str) -> _Errors:
    value = expected.values[name]
    if expected.exact:
        integers = INTEGERS[actual.element_size()]
        return _Errors(ratio=2.0 * (actual.view(integers) != value.view(integers)).any().double())
    wide = actual.double()
    error = (wide - value).abs_().masked_fill_(wide == value, 0.0)  # equal infinities would give NaN
    return _Errors(ratio=error / expected.bounds[name].clamp(min=_SMALLEST), error=error)


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
    return _Difference(bad=~within, ratio=ratio.nan_to_num(nan=torch.inf, posinf=torch.inf), bound=bound)


def _summary(errors: dict[str, _Errors], scores: dict[Check, Tensor]) -> tuple[dict[str, float], dict[Check, float]]:
    """The largest ratio of each output, and the largest of each score, in one transfer."""
    numbers = [_largest(found) for found in (*(output.ratio for output in errors.values()), *scores.values())]
    found = torch.stack(numbers).tolist() if numbers else []
    ratios = dict(zip(errors, found[: len(errors)], strict=True))
    return ratios, dict(zip(scores, found[len(errors) :], strict=True))


def _largest(ratios: Tensor) -> Tensor:
    return ratios.amax() if ratios.numel() else ratios.new_zeros(())


def _describe_score(
    check: Check, score: Tensor, actual: dict[str, Tensor], expected: Expected, problem: Problem
) -> Mismatch:
    """The output's mismatch where only the statistics are broken."""
    name, kind = check
    if kind != SUB_GAUSSIAN:
        return describe(kind, score, actual[name], problem)
    assert expected.statistics is not None
    difference = _Difference(bad=score > LIMITS[kind], ratio=score, bound=expected.statistics.bounds[name])
    return replace(_describe(name, actual[name], expected, difference, problem), check=kind)


def _describe(name: str, actual: Tensor, expected: Expected, difference: _Difference, problem: Problem) -> Mismatch:
    """The output's mismatch, told by the element that is furthest outside of its bound."""
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
