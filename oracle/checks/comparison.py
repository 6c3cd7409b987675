"""One run's outputs against another's: bit by bit, or within what the two may be apart."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..bound.evaluate import Expected
from ..compare import compare
from ..verdict import Mismatch, Outcome
from .finding import Finding
from .memory import bits_of
from .session import Session

Outputs = dict[str, Tensor]


def same_bits(session: Session, again: Outputs, what: str, outcome: Outcome = Outcome.DIFFERS) -> Finding | None:
    """`again` has the bits of the session's outputs. `what`: "after a change of ..."; `outcome`: if it has not."""
    expected = Expected(values=session.actual, bounds={}, dtypes=session.expected.dtypes, exact=True)
    mismatches, _ = compare(again, expected, session.problem)
    if not mismatches:
        return None
    worst = mismatches[0]
    if not worst.index:
        return Finding(worst.outcome, f"{worst.where}, {what}")
    if math.isfinite(worst.expected) and not math.isfinite(worst.actual):
        outcome = Outcome.POISONED
    count = f"{worst.count} of {worst.total} elements have other bits {what}"
    return Finding(outcome, f"{worst.output}: {count}, the furthest at {worst.where}: {_pair(worst)}")


def within(session: Session, again: Outputs, what: str, expected: Expected) -> Finding | None:
    """`again` is within `expected.bounds` of `expected.values`, both float64 and by output name.

    Nothing else is asked: what a case's statistics say is of one run and of the case's own arguments.
    """
    mismatches, _ = compare(again, replace(expected, statistics=None), session.problem)
    if not mismatches:
        return None
    worst = mismatches[0]
    if not worst.index:
        return Finding(worst.outcome, f"{worst.where}, {what}")
    count = f"{worst.count} of {worst.total} elements are too far off {what}"
    where = f"the furthest at {worst.where}: {_pair(worst)}, up to {worst.bound:.3g} allowed"
    return Finding(worst.outcome, f"{worst.output}: {count}, {where}")


def twice_bounded(session: Session) -> Expected:
    """The session's outputs, with the bounds of two runs: what another run on the same values may give."""
    values = {name: tensor.double() for name, tensor in session.actual.items()}
    bounds = {name: 2 * bound for name, bound in session.expected.bounds.items()}
    return replace(session.expected, values=values, bounds=bounds)


def expected_rows(session: Session, index: Tensor, values: Outputs, bounds: Outputs) -> Expected:
    """Float64 values and bounds for the rows `index` [rows] int64 of the outputs; the other rows as they are."""
    whole = {name: tensor.double() for name, tensor in session.actual.items()}
    allowed = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    for name in whole:
        whole[name][index] = values[name]
        allowed[name][index] = bounds[name]
    return replace(session.expected, values=whole, bounds=allowed)


def put_back(session: Session, again: Outputs, index: Tensor) -> Outputs:
    """The session's outputs with the rows `index` [rows] int64 replaced by those of `again`, in this order."""
    outputs = {}
    for name, tensor in session.actual.items():
        whole = tensor.clone()
        bits_of(whole)[index] = bits_of(again[name])
        outputs[name] = whole
    return outputs


def _pair(mismatch: Mismatch) -> str:
    return f"{mismatch.actual:.9g} against {mismatch.expected:.9g}"
