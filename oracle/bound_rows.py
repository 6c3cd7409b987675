"""The hard bound of one chunk of attention rows: outputs and lse."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.attention import Answer, weigh
from ..reference.problem import Rules
from .bound_scores import Operands, RowScalars, row_scalars, score_errors
from .candidate import NumericContract
from .formats import FLUSH, TF32, Format, U, format_of

# A logit that is not known to within this says nothing about its row, unless its weight stays under exp(-100)
# all the same; and exp(100) is far from the end of float64.
HOPELESS = 100.0

# Denominator, v's scale, and what a reciprocal or an approximate division costs beyond one rounding.
DIVISION_ROUNDINGS = 6


def row_bounds(answer: Answer, rules: Rules, contract: NumericContract, operands: Operands) -> tuple[Tensor, Tensor]:
    """(bound of out [G, Hkv, g, T, Dv] before it is cast, bound of lse [G, Hkv, g, T]), float64, absolute.

    Formula 1.3 of docs/bound.md. Rows that need no arithmetic (nothing visible, a sink of +inf) get 0, but
    for the few roundings of a sink's logit that is its row's lse. Rows of which nothing can be said get inf.
    """
    scalars = row_scalars(answer, contract)
    errors, sink_errors = score_errors(answer, rules, contract, operands, scalars)
    steps = (scalars.num_tiles + scalars.num_splits + 2) * (contract.exp_error + 2 * U)
    errors, sink_errors = errors + steps[..., None], sink_errors + steps
    hopeless = _hopeless(errors, answer.scores.s - scalars.lse[..., None]).any(dim=-1)
    hopeless = (hopeless | _hopeless(sink_errors, scalars.sink - scalars.lse)) & ~scalars.exact
    growth = torch.expm1(errors.clamp(max=HOPELESS))
    sink_growth = torch.expm1(sink_errors.clamp(max=HOPELESS))
    p, p_sink = answer.weights.p, answer.weights.p_sink
    moved = p * growth
    lost = (p / (1 + growth)).sum(dim=-1) + p_sink / (1 + sink_growth)
    lost = torch.where(scalars.exact, 1.0, lost)
    gained = (moved.sum(dim=-1) + p_sink * sink_growth).clamp(min=0)
    out = _out_bound(answer, contract, operands, scalars, moved, lost, gained)
    lse = _lse_bound(answer, contract, scalars, lost, gained)
    out = torch.where(scalars.exact[..., None], 0.0, torch.where(hopeless[..., None], torch.inf, out))
    return out, torch.where(hopeless, torch.inf, lse)


def _hopeless(error: Tensor, log_weight: Tensor) -> Tensor:
    return (error > HOPELESS) & (log_weight + error > -HOPELESS)


def _out_bound(
    answer: Answer,
    contract: NumericContract,
    operands: Operands,
    scalars: RowScalars,
    moved: Tensor,
    lost: Tensor,
    gained: Tensor,
) -> Tensor:
    value_format = _probability_format(contract)
    n, tiles, splits = (part[..., None] for part in (scalars.num_keys, scalars.num_tiles, scalars.num_splits))
    size = answer.out.abs()
    v = answer.rows.v.abs()
    least, total = lost[..., None], gained[..., None]
    denominator = torch.where(scalars.exact, 1.0, answer.weights.denominator)[..., None]

    # Numerator and denominator share the errors of the weights: what moves is sum P (rho - 1) (v - o).
    shifted = weigh(moved, v)
    weight = (weigh(answer.weights.p, v) + shifted) / least
    bound = (shifted + total * size) / least

    # P and V are rounded, and their products are added up: 17 aligned addends per 16 keys.
    u_value = contract.u_value_cast + (TF32 if contract.tf32 else 0.0)
    adding = torch.expm1((1.1 * n + tiles) * contract.u_value)
    rounding = (1 + value_format.roundoff) * (1 + u_value) * (1 + adding) - 1
    if operands.value_error is not None:
        wrong = (weigh(answer.weights.p, operands.value_error) + weigh(moved, operands.value_error)) / least
        bound = bound + wrong
        weight = weight + wrong
    bound = bound + rounding * weight
    if value_format.underflow > 0:
        bound = bound + value_format.underflow * _lost_values(answer, value_format) / (
            denominator * least.clamp(max=1.0)
        )

    # The denominator's own sum, and the cast P in it where the kernel sums that.
    dividing = torch.expm1((n + tiles) * contract.u_sum)
    if contract.cast_denominator:
        dividing = dividing + value_format.roundoff + value_format.underflow * n / (denominator * least.clamp(max=1.0))
    bound = bound + dividing * (size + bound)
    merging = torch.where(splits > 0, contract.u_partial + (splits + 4) * U, 0.0)
    bound = bound + merging * (weight + size + 2 * bound)
    bound = bound + (DIVISION_ROUNDINGS + 2 * operands.value_scales) * U * (size + bound)
    return bound + (2 * n + tiles + splits) * FLUSH * _largest_value(answer).clamp(min=1.0) / denominator


def _lost_values(answer: Answer, cast: Format) -> Tensor:
    """sum of |v_j| over the visible keys [G, Hkv, g, T, Dv]: what may be lost where a cast P underflows to 0."""
    visible = answer.rows.visible[:, None, None].double()
    if cast.underflow > FLUSH:
        return weigh(visible.expand(answer.weights.p.shape), answer.rows.v.abs())
    return visible.sum(dim=-1, keepdim=True) * _largest_value(answer)  # so small that a coarse sum will do


def _largest_value(answer: Answer) -> Tensor:
    """max |v| of each request, [G, 1, 1, 1, 1]."""
    return answer.rows.v.abs().amax(dim=(1, 2, 3))[:, None, None, None, None]


def _lse_bound(answer: Answer, contract: NumericContract, scalars: RowScalars, lost: Tensor, gained: Tensor) -> Tensor:
    """Of m + log(l): the weights' errors, the row sum's, and the roundings of the logarithm."""
    bound = torch.maximum(torch.log1p(gained), -torch.log(lost))
    bound = bound + (scalars.num_keys + scalars.num_tiles) * contract.u_sum
    if contract.cast_denominator:
        cast = _probability_format(contract)
        denominator = torch.where(scalars.exact, 1.0, answer.weights.denominator)
        bound = bound + cast.roundoff + cast.underflow * scalars.num_keys / (denominator * lost.clamp(max=1.0))
    size = scalars.lse.abs() + scalars.maximum.abs()
    bound = bound + U * (6 * size + 8 * (scalars.num_splits + 2))
    sink_alone = torch.where(scalars.has_sink, 4 * U * scalars.sink.abs(), 0.0)
    return torch.where(scalars.exact, sink_alone, bound)


def _probability_format(contract: NumericContract) -> Format:
    """What P goes through before P @ V; float32 is what exp already gave, and costs nothing."""
    if contract.p_dtype == "float32":
        return Format(TF32, 0.0, float("inf")) if contract.tf32 else Format(0.0, 0.0, float("inf"))
    return format_of(contract.p_dtype)
