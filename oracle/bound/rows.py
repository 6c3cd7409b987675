"""The hard bound of one chunk of attention rows: outputs and lse (docs/bound.md, "Outputs")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...reference.attention import Answer, weigh
from ...reference.problem import Rules
from ..candidate import NumericContract
from .formats import EXACT, FLUSH, TF32, Format, U, format_of
from .scores import Operands, RowScalars, row_scalars, score_errors

# A logit that is not known to within this says nothing about its row, unless its weight stays under exp(-100)
# all the same; and exp(100) is far from the end of float64.
HOPELESS = 100.0

# Denominator, and what a reciprocal or an approximate division costs beyond one rounding.
DIVISION_ROUNDINGS = 6


@dataclass(frozen=True)
class _Weights:
    """What wrong logits do to the weights; float64, [G, Hkv, g, T] but for the first."""

    moved: Tensor  # [G, Hkv, g, T, L]: P (e^r - 1)
    gained: Tensor  # sum of P (e^r - 1), sink included
    least: Tensor  # sum of P e^-r, sink included: the least that the weights may sum up to; 1 in exact rows
    hopeless: Tensor  # bool: nothing can be said
    underflow: Tensor  # 1 / (L min(1, least)): what an absolute error of an unnormalised weight is worth


@dataclass(frozen=True)
class RowBounds:
    """The hard bounds, absolute, and what they were made of; float64, [G, Hkv, g, T] or [G, Hkv, g, T, Dv]."""

    out: Tensor  # [..., Dv]: of the output before it is cast
    lse: Tensor
    scalars: RowScalars
    least: Tensor  # the least that the weights may sum up to; 1 in exact rows
    values: Tensor  # W [..., Dv]: sum of P |v|


def row_bounds(answer: Answer, rules: Rules, contract: NumericContract, operands: Operands) -> RowBounds:
    """The hard bounds of one chunk.

    Rows that need no arithmetic (nothing visible, a sink of +inf) get 0, but for the few roundings of a sink's
    logit that is its row's lse. Rows of which nothing can be said get inf.
    """
    scalars = row_scalars(answer, contract)
    weights = _weights(answer, contract, scalars, *score_errors(answer, rules, contract, operands, scalars))
    out, values = _out_bound(answer, contract, operands, scalars, weights)
    lse = _lse_bound(contract, scalars, weights)
    out = torch.where(scalars.exact[..., None], 0.0, torch.where(weights.hopeless[..., None], torch.inf, out))
    lse = torch.where(weights.hopeless, torch.inf, lse)
    return RowBounds(out, lse, scalars, weights.least, values)


def _weights(
    answer: Answer, contract: NumericContract, scalars: RowScalars, errors: Tensor, sink_errors: Tensor
) -> _Weights:
    steps = (scalars.num_tiles + scalars.num_splits + 2) * (contract.exp_error + 2 * U)
    errors, sink_errors = errors + steps[..., None], sink_errors + steps
    hopeless = _hopeless(errors, answer.scores.s - scalars.lse[..., None]).any(dim=-1)
    hopeless = (hopeless | _hopeless(sink_errors, scalars.sink - scalars.lse)) & ~scalars.exact
    growth = torch.expm1(errors.clamp(max=HOPELESS))
    sink_growth = torch.expm1(sink_errors.clamp(max=HOPELESS))
    p, p_sink = answer.weights.p, answer.weights.p_sink
    moved = p * growth
    least = (p / (1 + growth)).sum(dim=-1) + p_sink / (1 + sink_growth)
    least = torch.where(scalars.exact, 1.0, least)
    denominator = torch.where(scalars.exact, 1.0, answer.weights.denominator)
    return _Weights(
        moved=moved,
        gained=moved.sum(dim=-1) + p_sink * sink_growth,
        least=least,
        hopeless=hopeless,
        underflow=1 / (denominator * least.clamp(max=1.0)),
    )


def _hopeless(error: Tensor, log_weight: Tensor) -> Tensor:
    return (error > HOPELESS) & (log_weight + error > -HOPELESS)


def _out_bound(
    answer: Answer, contract: NumericContract, operands: Operands, scalars: RowScalars, weights: _Weights
) -> tuple[Tensor, Tensor]:
    """(the bound before the cast, W)."""
    cast = probability_format(contract)
    n, tiles, splits = (part[..., None] for part in (scalars.num_keys, scalars.num_tiles, scalars.num_splits))
    least, gained, underflow = (part[..., None] for part in (weights.least, weights.gained, weights.underflow))
    p, size, v = answer.weights.p, answer.out.abs(), answer.rows.v.abs()

    # Numerator and denominator share the errors of the weights: what moves is sum P (rho - 1) (v - o).
    shifted = weigh(weights.moved, v)
    bound = (shifted + gained * size) / least
    values = weigh(p, v)
    weighed = (values + shifted) / least
    rounded = format_of(contract.value_dtype) if contract.value_dtype else EXACT
    if operands.value_error is not None:
        wrong = weigh(p + weights.moved, operands.value_error) / least
        bound, weighed = bound + wrong, weighed + wrong
    if rounded.underflow > 0:
        wrong = rounded.underflow * (p + weights.moved).sum(dim=-1)[..., None] / least
        bound, weighed = bound + wrong, weighed + wrong

    # P and V are rounded, P may underflow, and their products are added up.
    adding = torch.expm1(value_steps(n, tiles) * contract.u_value)
    u_value = rounded.roundoff + (TF32 if contract.tf32 else 0.0)
    bound = bound + ((1 + cast.roundoff) * (1 + u_value) * (1 + adding) - 1) * weighed
    if cast.underflow > 0:
        bound = bound + cast.underflow * underflow * _lost_values(answer, v, cast)

    # The denominator's own sum, with the cast P in it where the kernel sums that; the merge; the division.
    dividing = torch.expm1((n + tiles) * contract.u_sum)
    if contract.cast_denominator:
        dividing = dividing + cast.roundoff + cast.underflow * underflow * n
    bound = bound + dividing * (size + bound)
    if contract.split_keys is not None:
        bound = bound + (contract.u_partial + (splits + 4) * U) * (weighed + size + 2 * bound)
    bound = bound + (DIVISION_ROUNDINGS + 2 * operands.value_scales) * U * (size + bound)
    bound = bound + (2 * n + tiles + splits) * FLUSH * underflow * _largest(v).clamp(min=1.0)
    return bound, values


def value_steps(num_keys: Tensor, num_tiles: Tensor) -> Tensor:
    """Roundings of P @ V's sums, every one at its worst: 17 aligned addends for every 16 keys, and one per tile."""
    return 1.1 * num_keys + num_tiles


def _lost_values(answer: Answer, v: Tensor, cast: Format) -> Tensor:
    """sum of |v_j| over the visible keys [G, Hkv, g, T, Dv]: what may be lost where a cast P underflows to 0."""
    visible = answer.rows.visible[:, None, None].double()
    if cast.underflow > FLUSH:
        return weigh(visible.expand(answer.weights.p.shape), v)
    return visible.sum(dim=-1, keepdim=True) * _largest(v)  # so small that a coarse sum will do


def _largest(v: Tensor) -> Tensor:
    """max |v| of each request, [G, 1, 1, 1, 1]."""
    return v.amax(dim=(1, 2, 3))[:, None, None, None, None]


def _lse_bound(contract: NumericContract, scalars: RowScalars, weights: _Weights) -> Tensor:
    """Of m + log(l): the weights' errors, the row sum's, and the roundings of the logarithm."""
    bound = torch.maximum(torch.log1p(weights.gained), -torch.log(weights.least))
    bound = bound + (scalars.num_keys + scalars.num_tiles) * contract.u_sum
    if contract.cast_denominator:
        cast = probability_format(contract)
        bound = bound + cast.roundoff * (1 + cast.roundoff) + cast.underflow * weights.underflow * scalars.num_keys
    size = scalars.lse.abs() + scalars.maximum.abs()
    bound = bound + U * (6 * size + 8 * (scalars.num_splits + 2))
    sink_alone = torch.where(scalars.has_sink, 4 * U * scalars.sink.abs(), 0.0)
    return torch.where(scalars.exact, sink_alone, bound)


def probability_format(contract: NumericContract) -> Format:
    """What P goes through before P @ V; float32 is what exp already gave, and costs nothing."""
    if contract.p_dtype == "float32":
        return Format(TF32, 0.0, float("inf")) if contract.tf32 else EXACT
    return format_of(contract.p_dtype)
