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


def sum_steps(terms: float) -> float:
    """Roundings of a sum of products: a tensor core adds 17 aligned addends for every 16 products."""
    return 1.1 * terms + 2


def num_tiles(span: Tensor, contract: NumericContract) -> Tensor:
    """N of a row whose keys lie within `span`: as many steps of the online softmax, wherever the first one begins."""
    return torch.ceil(span / contract.tile_keys) + 1


def num_splits(span: Tensor, contract: NumericContract) -> Tensor:
    """S, counted in the same way; 0 where the kernel never splits."""
    return torch.zeros_like(span) if contract.split_keys is None else torch.ceil(span / contract.split_keys) + 1


def exponent_steps(span: Tensor, contract: NumericContract) -> Tensor:
    """What every tile and split adds to the exponent of a weight: the error of one exp and its two roundings."""
    return (num_tiles(span, contract) + num_splits(span, contract) + 2) * (contract.exp_error + 2 * U)


def merging_error(lse: Tensor, maximum: Tensor, rules: Rules, contract: NumericContract) -> Tensor | None:
    """Weights made from logarithms, exp(lse_i - lse), round those logarithms; None where there are no such weights."""
    if contract.split_keys is None and not (contract.late_sink and rules.sinks is not None):
        return None
    return U * (4 * lse.abs() + 3 * maximum.abs() + 8)


def score_errors(answer: Answer, rules: Rules, contract: NumericContract, operands: Operands, span: Tensor) -> Tensor:
    """r_j [G, Hkv, g, T, L]: e_j and the steps of the exponent, float64; 0 where there is no key.

    docs/bound.md, "Logits". The exponents of an online softmax telescope, (s-m1)+(m1-m2)+..., and all
    have one sign, so their argument errors sum to a multiple of u*(M-s); the running maximum itself is
    exact and cancels. span: [G, 1, 1, T], from a row's first visible key to its last.
    """
    scores, maximum, lse = answer.scores, answer.weights.maximum, answer.weights.lse
    error = _product_error(answer, rules, contract, operands)
    if answer.rows.softcap is not None:
        error = _softcap_error(error, scores.x, scores.y, answer.rows.softcap, contract)
    if scores.bias is not None:
        error.add_(_bias_error(answer, rules))
    of_row = torch.add(exponent_steps(span, contract), maximum.abs(), alpha=U * contract.exponent_roundings)
    of_row.add_(maximum, alpha=4 * U)  # with -s below
    merging = merging_error(lse, maximum, rules, contract)
    if merging is not None:
        of_row = of_row + merging
    error.add_(scores.s, alpha=-4 * U).add_(scores.s.abs(), alpha=U * contract.exponent_roundings)
    return error.add_(of_row[..., None]).masked_fill_(answer.rows.hidden[:, None, None], 0.0)


def _product_error(answer: Answer, rules: Rules, contract: NumericContract, operands: Operands) -> Tensor:
    """e1: of softmax_scale * <q, k>."""
    rows = answer.rows
    head_size = rows.q.shape[-1]
    relative = math.expm1(sum_steps(head_size) * contract.u_score) + 4 * U + 2 * U * operands.score_scales
    rounded = format_of(contract.key_dtype) if contract.key_dtype else EXACT
    relative += rounded.roundoff * (1 + rounded.roundoff)
    if contract.tf32:
        relative += 2 * TF32 + TF32**2
    scale = abs(rules.softmax_scale)
    key_error = rows.k.abs().mul_(scale * relative)
    if rounded.underflow > 0:
        key_error.add_(scale * rounded.underflow)
    if operands.key_error is not None:
        key_error.add_(operands.key_error, alpha=scale * (1 + relative))
    return dot(rows.q.abs(), key_error)


def _softcap_error(error: Tensor, x: Tensor, y: Tensor, softcap: float | Tensor, contract: NumericContract) -> Tensor:
    """e2: of y = c * tanh(x / c), given that of x."""
    size = x.abs()
    slope = torch.cosh((size - error).clamp_(min=0).div_(softcap)).pow_(-2)  # cosh may be inf: the slope is then 0
    moved = torch.add(error, size, alpha=2 * U)
    constant: float | Tensor = 0.0
    of_y = 4 * U
    if contract.tanh in ("exp", "series"):
        moved.add_(size.clamp_(max=40 * softcap), alpha=4 * U)
    if contract.tanh == "exp":
        constant = softcap * (4 * U + 1.5 * contract.exp_error)
    elif contract.tanh == "series":
        of_y = 16 * U + 3 * contract.exp_error
    elif contract.tanh == "approx":
        of_y = TANH_APPROX + 4 * U
    return torch.addcmul(y.abs().mul_(of_y).add_(constant), moved, slope)


def _bias_error(answer: Answer, rules: Rules) -> Tensor:
    """What ALiBi and the query bias add: two roundings of the term itself and one of the sum, each."""
    scores = answer.scores
    assert scores.bias is not None
    total = scores.y.abs()
    error: Tensor | None = None
    query_bias = None if answer.rows.query_bias is None else answer.rows.query_bias[:, None, None]
    alibi = scores.bias if query_bias is None else scores.bias - query_bias
    for term in (alibi if rules.alibi_slopes is not None else None, query_bias):
        if term is not None:
            size = term.abs()
            total = total + size
            step = torch.add(total, size, alpha=2)
            error = step if error is None else error + step
    assert error is not None
    return U * error
