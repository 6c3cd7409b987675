"""The hard bounds of attention rows, outputs and lse, from the sums over their keys (docs/bound.md, "Outputs")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...reference.problem import Rules
from ..candidate import NumericContract
from .formats import EXACT, FLUSH, TF32, U, format_of
from .scores import Operands, exponent_steps, merging_error, num_splits, num_tiles
from .sums import RowSums, probability_format

# Denominator, and what a reciprocal or an approximate division costs beyond one rounding.
DIVISION_ROUNDINGS = 6


@dataclass(frozen=True, kw_only=True)
class RowBounds:
    """The hard bounds, absolute, and what they were made of; float64 [num_tokens, num_query_heads(, head_size_v)]."""

    out: Tensor  # [..., Dv]: of the output before it is cast
    lse: Tensor
    exact: Tensor  # bool: nothing visible, or a sink of +inf; the answer is then a constant
    num_tiles: Tensor  # N
    reciprocal: Tensor  # 1 / the least that the weights may sum up to


@dataclass(frozen=True)
class _Rows:
    """What the weights' errors come to with the sink among them, [num_tokens, num_query_heads]."""

    exact: Tensor
    num_tiles: Tensor
    num_splits: Tensor
    gained: Tensor  # sum of P (e^r - 1)
    least: Tensor  # sum of P e^-r
    p_sink: Tensor | float  # the sink's share
    lse_of_sink: Tensor | float  # what the lse of an exact row may be off by


def row_bounds(sums: RowSums, rules: Rules, contract: NumericContract, operands: Operands) -> RowBounds:
    """The hard bounds of all rows of a case.

    Rows that need no arithmetic get 0, but for the few roundings of a sink's logit that is its row's lse. Rows with
    a logit so little known that its weight overflows float64 get inf.
    """
    rows = _with_sinks(sums, rules, contract)
    reciprocal = rows.least.reciprocal()
    out = _out_bound(sums, contract, operands, rows, reciprocal)
    lse = _lse_bound(sums, contract, rows)
    exact = rows.exact
    out = out.nan_to_num_(nan=torch.inf, posinf=torch.inf).masked_fill_(exact[..., None], 0.0)
    lse = lse.nan_to_num_(nan=torch.inf, posinf=torch.inf).masked_fill_(exact, 0.0)
    if rules.sinks is not None:
        lse = lse + rows.lse_of_sink
    return RowBounds(out=out, lse=lse, exact=exact, num_tiles=rows.num_tiles, reciprocal=reciprocal)


def _with_sinks(sums: RowSums, rules: Rules, contract: NumericContract) -> _Rows:
    tiles, splits = num_tiles(sums.span, contract), num_splits(sums.span, contract)
    exact = sums.num_keys == 0
    if rules.sinks is None:
        return _Rows(exact, tiles, splits, sums.gained, sums.least, 0.0, 0.0)
    exact = exact | (sums.lse == torch.inf)
    present = sums.sink.isfinite()
    sink = torch.where(present, sums.sink, 0.0)
    error = U * (4 * (sums.maximum - sink).clamp(min=0) + 4 * sums.maximum.abs()) + exponent_steps(sums.span, contract)
    merging = merging_error(sums.lse, sums.maximum, rules, contract)
    if merging is not None:
        error = error + merging
    p_sink = torch.exp(sums.sink - sums.lse)
    gained = torch.where(present, p_sink * torch.expm1(error), 0.0) + sums.gained
    least = torch.where(present, p_sink * torch.exp(-error), 0.0) + sums.least
    # A row that belongs to no request has no sink either: its lse is -inf, exactly.
    alone = torch.where(exact & present & (sums.lse > -torch.inf), 4 * U * sink.abs(), 0.0)
    return _Rows(exact, tiles, splits, gained, least, p_sink, alone)


def _out_bound(sums: RowSums, contract: NumericContract, operands: Operands, rows: _Rows, reciprocal: Tensor) -> Tensor:
    cast = probability_format(contract)
    rounded = format_of(contract.value_dtype) if contract.value_dtype else EXACT
    size, per_least = sums.out.abs(), reciprocal[..., None]

    # Numerator and denominator share the errors of the weights: what moves is sum P (rho - 1) (v - o).
    bound = torch.addcmul(sums.moved, rows.gained[..., None], size).mul_(per_least)
    weighed = (sums.values + sums.moved).mul_(per_least)
    if sums.wrong is not None:
        wrong = sums.wrong * per_least
        bound.add_(wrong)
        weighed.add_(wrong)
    if rounded.underflow > 0:
        wrong = (rounded.underflow * (1 - rows.p_sink + sums.gained) * reciprocal)[..., None]
        bound.add_(wrong)
        weighed.add_(wrong)

    # P and V are rounded, P may underflow, and their products are added up.
    relative = (1 + cast.roundoff) * (1 + rounded.roundoff + (TF32 if contract.tf32 else 0.0))
    adding = torch.expm1(value_steps(sums.num_keys, rows.num_tiles) * contract.u_value)
    bound.addcmul_((adding * relative).add_(relative - 1)[..., None], weighed)
    # What an absolute error of an unnormalised weight is worth: 1 / (L min(1, Dmin)).
    worth = (sums.denominator * rows.least.clamp(max=1.0)).reciprocal_()
    if sums.lost is not None:
        bound.addcmul_(worth[..., None], sums.lost, value=cast.underflow)
    elif cast.underflow > 0:  # so small that a coarse sum will do
        bound.add_((worth * sums.num_keys * sums.largest)[..., None], alpha=cast.underflow)

    # The denominator's own sum, with the cast P in it where the kernel sums that; the merge; the division.
    dividing = torch.expm1((sums.num_keys + rows.num_tiles) * contract.u_sum)
    if contract.cast_denominator:
        dividing.add_(cast.roundoff).addcmul_(worth, sums.num_keys, value=cast.underflow)
    bound.addcmul_(dividing[..., None], size + bound)
    if contract.split_keys is not None:
        merging = rows.num_splits * U + (contract.u_partial + 4 * U)
        bound.addcmul_(merging[..., None], (weighed + size).add_(bound, alpha=2))
    bound.add_(size + bound, alpha=(DIVISION_ROUNDINGS + 2 * operands.value_scales) * U)
    flushed = torch.add(rows.num_tiles + rows.num_splits, sums.num_keys, alpha=2)
    flushed.mul_(worth).mul_(sums.largest.clamp(min=1.0))
    return bound.add_(flushed[..., None], alpha=FLUSH)


def value_steps(num_keys: Tensor, tiles: Tensor) -> Tensor:
    """Roundings of P @ V's sums, every one at its worst: 17 aligned addends for every 16 keys, and one per tile."""
    return torch.add(tiles, num_keys, alpha=1.1)


def _lse_bound(sums: RowSums, contract: NumericContract, rows: _Rows) -> Tensor:
    """Of m + log(l): the weights' errors, the row sum's, and the roundings of the logarithm."""
    bound = torch.maximum(torch.log1p(rows.gained), -torch.log(rows.least))
    bound.add_(sums.num_keys + rows.num_tiles, alpha=contract.u_sum)
    if contract.cast_denominator:
        cast = probability_format(contract)
        worth = (sums.denominator * rows.least.clamp(max=1.0)).reciprocal_()
        bound.add_(cast.roundoff * (1 + cast.roundoff)).addcmul_(worth, sums.num_keys, value=cast.underflow)
    bound.add_(sums.lse.abs() + sums.maximum.abs(), alpha=6 * U)
    return bound.add_(rows.num_splits + 2, alpha=8 * U)
