"""How far a kernel's logits may be from the exact ones: e_j, absolute, in natural-log units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...reference.attention import Answer, dot
from ...reference.problem import Rules
from ..candidate import NumericContract
from .formats import EXACT, TF32, U, format_of

TANH_APPROX = 2.0**-11  # relative error of tanh.approx.f32


@dataclass(frozen=True, kw_only=True)
class Operands:
    """What a kernel did to q, k and v before it multiplied them, beside what its contract says."""

    score_scales: int = 0  # of scales.q and scales.k, how many there are
    value_scales: int = 0  # 1 with scales.v
    key_error: Tensor | None = None  # [G, L, Hkv, D] float64: absolute error of k, where it is itself computed
    value_error: Tensor | None = None  # [G, L, Hkv, Dv] float64: likewise of v


@dataclass(frozen=True)
class RowScalars:
    """Per row [G, Hkv, g, T] float64; M and lse are 0 in rows whose answer needs no arithmetic."""

    exact: Tensor  # bool: nothing visible, or a sink of +inf; the answer is then a constant
    maximum: Tensor
    lse: Tensor
    sink: Tensor  # where it is finite, elsewhere 0
    has_sink: Tensor  # bool: the sink is finite
    num_keys: Tensor  # n: visible keys
    num_tiles: Tensor  # N = ceil(span / tile_keys) + 1, the span being last - first visible key + 1
    num_splits: Tensor  # S = ceil(span / split_keys) + 1, or 0 where the kernel never splits


def sum_steps(terms: float) -> float:
    """Roundings of a sum of products: a tensor core adds 17 aligned addends for every 16 products."""
    return 1.1 * terms + 2


def row_scalars(answer: Answer, contract: NumericContract) -> RowScalars:
    weights = answer.weights
    visible = answer.rows.visible
    num_keys = visible.sum(dim=2)
    columns = torch.arange(visible.shape[2], device=visible.device)
    last = torch.where(visible, columns, -1).amax(dim=2)
    first = torch.where(visible, columns, visible.shape[2]).amin(dim=2)
    span = (last - first + 1).clamp(min=0)
    shape = weights.lse.shape

    def per_row(counts: Tensor) -> Tensor:
        return counts.double()[:, None, None].expand(shape)

    sink = weights.sink[None, :, :, None].expand(shape)
    exact = per_row(num_keys == 0).bool() | ~weights.lse.isfinite()
    has_sink = sink.isfinite()
    splits = torch.zeros_like(span) if contract.split_keys is None else _ceil_div(span, contract.split_keys) + 1
    return RowScalars(
        exact=exact,
        maximum=torch.where(exact, 0.0, weights.maximum),
        lse=torch.where(exact, 0.0, weights.lse),
        sink=torch.where(has_sink, sink, 0.0),
        has_sink=has_sink,
        num_keys=per_row(num_keys),
        num_tiles=per_row(_ceil_div(span, contract.tile_keys) + 1),
        num_splits=per_row(splits),
    )


def score_errors(
    answer: Answer, rules: Rules, contract: NumericContract, operands: Operands, scalars: RowScalars
) -> tuple[Tensor, Tensor]:
    """(e_j [G, Hkv, g, T, L], e_sink [G, Hkv, g, T]), float64; 0 where there is no key, no sink.

    docs/bound.md, "Logits". The exponents of an online softmax telescope, (s-m1)+(m1-m2)+..., and all
    have one sign, so their argument errors sum to a multiple of u*(M-s); the running maximum itself is
    exact and cancels.
    """
    scores = answer.scores
    error = _product_error(answer, rules, contract, operands)
    if rules.softcap is not None:
        error = _softcap_error(error, scores.x, scores.y, rules.softcap, contract)
    if scores.bias is not None:
        error = error + _bias_error(answer, rules)
    visible = answer.rows.visible[:, None, None]
    s = torch.where(visible, scores.s, 0.0)
    maximum = scalars.maximum[..., None]
    error = error + U * (4 * (maximum - s).clamp(min=0) + contract.exponent_roundings * (s.abs() + maximum.abs()))
    # Weights made from logarithms, exp(lse_i - lse), round those logarithms.
    late = contract.late_sink and rules.sinks is not None
    merging = torch.where(scalars.num_splits > 0, 1.0, float(late))
    merging = merging * U * (4 * scalars.lse.abs() + 3 * scalars.maximum.abs() + 8)
    sink_error = U * (4 * (scalars.maximum - scalars.sink).clamp(min=0) + 4 * scalars.maximum.abs()) + merging
    error = torch.where(visible, error + merging[..., None], 0.0)
    return error, torch.where(scalars.has_sink & ~scalars.exact, sink_error, 0.0)


def _product_error(answer: Answer, rules: Rules, contract: NumericContract, operands: Operands) -> Tensor:
    """e1: of softmax_scale * <q, k>."""
    rows = answer.rows
    head_size = rows.q.shape[-1]
    relative = math.expm1(sum_steps(head_size) * contract.u_score) + 4 * U + 2 * U * operands.score_scales
    rounded = format_of(contract.key_dtype) if contract.key_dtype else EXACT
    relative += rounded.roundoff * (1 + rounded.roundoff)
    if contract.tf32:
        relative += 2 * TF32 + TF32**2
    key_error = relative * rows.k.abs() + rounded.underflow
    if operands.key_error is not None:
        key_error = key_error + (1 + relative) * operands.key_error
    return abs(rules.softmax_scale) * dot(rows.q.abs(), key_error)


def _softcap_error(error: Tensor, x: Tensor, y: Tensor, softcap: float, contract: NumericContract) -> Tensor:
    """e2: of y = c * tanh(x / c), given that of x."""
    slope = torch.cosh((x.abs() - error).clamp(min=0) / softcap) ** -2  # cosh may be inf: the slope is then 0
    error = error * slope + 2 * U * x.abs() * slope
    if contract.tanh == "libm":
        return error + 4 * U * y.abs()
    if contract.tanh == "exp":
        argument = 4 * U * x.abs().clamp(max=40 * softcap) * slope
        return error + softcap * (4 * U + 1.5 * contract.exp_error) + 4 * U * y.abs() + argument
    if contract.tanh == "series":
        argument = 4 * U * x.abs().clamp(max=40 * softcap) * slope
        return error + (16 * U + 3 * contract.exp_error) * y.abs() + argument
    return error + (TANH_APPROX + 4 * U) * y.abs()


def _bias_error(answer: Answer, rules: Rules) -> Tensor:
    """What ALiBi and the query bias add: two roundings of the term itself and one of the sum, each."""
    scores = answer.scores
    assert scores.bias is not None
    total = scores.y.abs()
    error = torch.zeros_like(total)
    query_bias = None if answer.rows.query_bias is None else answer.rows.query_bias[:, None, None]
    alibi = scores.bias if query_bias is None else scores.bias - query_bias
    for term in (alibi if rules.alibi_slopes is not None else None, query_bias):
        if term is not None:
            total = total + term.abs()
            error = error + U * (2 * term.abs() + total)
    return error


def _ceil_div(counts: Tensor, step: int) -> Tensor:
    return (counts + step - 1) // step
