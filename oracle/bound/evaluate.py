"""What a problem's outputs should be, and how far from it a kernel of a declared arithmetic may end up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...reference.attention import answer
from ...reference.kv_cache import update_kv_cache, update_mla_cache
from ...reference.merge import merge_states
from ...reference.mla import decompress, latent_rows
from ...reference.problem import FLOAT8, Scales
from ...reference.rows import Rows, row_groups
from ..candidate import NumericContract
from ..formats import FLOAT8_LARGEST
from .formats import TF32, U, format_of
from .merge import merge_bounds
from .rows import row_bounds
from .scores import Operands, sum_steps
from .statistics import Statistics, statistics, why_not_generic
from .sums import Collector
from .together import Part, Together, alone, joined, together

if TYPE_CHECKING:
    from ..building.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The right answer by output name, and the bound of each element.

    `exact` (the cache updates): `values` hold the whole pools in their own format and every bit must match.
    Otherwise `values` and `bounds` are float64: an output agrees where |output - value| <= bound. An infinite
    value must be met exactly; an infinite bound leaves open whether a finite value overflows the output's
    format. For a float8 output, both count units of the stored format, after the division by its scale.
    """

    values: dict[str, Tensor]
    bounds: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    exact: bool = False
    statistics: Statistics | None = None  # of attention's out and lse, where roundings are independent

    def rows(self, first: int, stop: int) -> Expected:
        """That of some rows only, a whole case of several."""
        return replace(
            self,
            values={name: tensor[first:stop] for name, tensor in self.values.items()},
            bounds={name: tensor[first:stop] for name, tensor in self.bounds.items()},
            statistics=None if self.statistics is None else self.statistics.rows(first, stop),
        )


@torch.no_grad()
def evaluate(problem: Problem, contract: NumericContract, *, with_statistics: bool = True) -> Expected:
    """The reference in float64, once, and the bounds of docs/bound.md from the same intermediate values.

    with_statistics: also those, where the case is one of independent roundings; its arguments are then the case's own.

    For the cache updates, `problem.pristine` (the pools as they were before the candidate ran) is brought up
    to date in place: writing the same rows twice changes nothing.
    """
    operation = problem.case.spec.operation
    arguments = problem.arguments
    if operation == "update_kv_cache":
        update_kv_cache(**{**arguments, **problem.pristine})
        return _pools(problem.pristine)
    if operation == "update_mla_cache":
        update_mla_cache(**{**arguments, **problem.pristine})
        return _pools(problem.pristine)
    if operation == "merge_states":
        return _merged(arguments, contract)
    generic = with_statistics and why_not_generic(problem.case, contract) is None
    return _attended(alone(problem), contract, generic=generic)


@torch.no_grad()
def evaluate_together(problems: Sequence[Problem], contract: NumericContract, *, generic: bool) -> Expected:
    """The same of several attention problems or merges at once, their rows one after the other.

    problems: of one kernel (`together.kernel_of`) and one contract. generic: with statistics, where the roundings of
    all of them are independent.
    """
    if problems[0].case.spec.operation == "merge_states":
        parts = [problem.arguments for problem in problems]
        return _merged({name: joined([part[name] for part in parts]) for name in parts[0]}, contract)
    asked = alone(problems[0]) if len(problems) == 1 else together(problems)
    return _attended(asked, contract, generic=generic)


def _pools(pristine: dict[str, Tensor]) -> Expected:
    dtypes = {name: pool.dtype for name, pool in pristine.items()}
    return Expected(values=dict(pristine), bounds={}, dtypes=dtypes, exact=True)


def _merged(arguments: dict[str, Any], contract: NumericContract) -> Expected:
    out_a, lse_a, out_b, lse_b = (arguments[name].double() for name in ("out_a", "lse_a", "out_b", "lse_b"))
    out, lse = merge_states(out_a, lse_a, out_b, lse_b)
    out_bound, lse_bound = merge_bounds(out_a, lse_a, out_b, lse_b, lse, contract)
    dtypes = {"out": arguments["out_a"].dtype, "lse": arguments["lse_a"].dtype}
    out, out_bound = stored(out, out_bound, dtypes["out"])
    return Expected(values={"out": out, "lse": lse}, bounds={"out": out_bound, "lse": lse_bound}, dtypes=dtypes)


def _attended(asked: Together, contract: NumericContract, *, generic: bool) -> Expected:
    first = asked.parts[0].arguments
    is_decompressed = "w_uv" in first
    gathered = _decompressed if is_decompressed else _latent if "latent_cache" in first else _plain
    collector = Collector(asked.out, contract, with_squares=generic, with_wrong=is_decompressed)
    operands = Operands()
    for part in asked.parts:
        rules = part.arguments["rules"]
        for chunk, operands in gathered(part, contract):
            collector.add(answer(chunk, rules), rules, operands)
    sums = collector.finish()
    rows = row_bounds(sums, first["rules"], contract, operands)
    value, bound = stored(sums.out, rows.out, asked.out.dtype, asked.out_scale)
    bounds = {"out": bound, "lse": rows.lse}
    independent = statistics(sums, rows, bounds, format_of(asked.out.dtype), contract) if generic else None
    return Expected(
        values={"out": value, "lse": sums.lse},
        bounds=bounds,
        dtypes={"out": asked.out.dtype, "lse": asked.lse.dtype},
        statistics=None if independent is None else replace(independent, cases=asked.num_tokens),
    )


def stored(value: Tensor, bound: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The value and its bound after the one cast to `dtype`, with the division by `scale` before it.

    Rounding to nearest is monotone and clamping is 1-Lipschitz, so neither can widen what the computed and
    the exact value have between them by more than one rounding. A bound of 0 stays 0 where the value is 0.
    """
    if scale is not None:
        value = value / scale
        bound = bound / scale
        bound = bound + U * (value.abs() + bound)
    if dtype == FLOAT8:
        value = value.clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST)
    size = value.abs()
    largest = size + bound
    cast = format_of(dtype)
    rounded = torch.add(bound, largest, alpha=cast.roundoff).add_(cast.underflow).masked_fill_(largest == 0, 0.0)
    if math.isinf(cast.overflow):
        return value, rounded
    rounded.masked_fill_(largest >= cast.overflow, torch.inf)
    overflows = size - bound >= cast.overflow
    infinite = value.masked_fill(overflows, torch.inf).copysign_(value)
    return infinite, rounded.masked_fill_(overflows, 0.0)


Chunks = Iterator[tuple[Rows, Operands]]


def _plain(part: Part, contract: NumericContract) -> Chunks:
    q, k_cache, v_cache, batch, rules = (part.arguments[name] for name in ("q", "k_cache", "v_cache", "batch", "rules"))
    scales = part.arguments.get("scales") or Scales()
    operands = Operands(score_scales=_count(scales.q, scales.k), value_scales=_count(scales.v))
    chunks = row_groups(q, k_cache, v_cache, batch, rules, part.common(scales), requests=part.requests)
    for rows in chunks:
        yield part.with_own(rows), operands


def _latent(part: Part, contract: NumericContract) -> Chunks:
    q_nope, q_pe, latent_cache = (part.arguments[name] for name in ("q_nope", "q_pe", "latent_cache"))
    batch, rules = part.arguments["batch"], part.arguments["rules"]
    scales = part.arguments.get("scales") or Scales()
    operands = Operands(score_scales=_count(scales.q, scales.k), value_scales=_count(scales.k))
    rank, common = q_nope.shape[2], part.common(scales)
    for rows in latent_rows(q_nope, q_pe, latent_cache, rank, batch, rules, common, requests=part.requests):
        yield part.with_own(rows), operands


def _decompressed(part: Part, contract: NumericContract) -> Chunks:
    """Keys and values are computed here, k_nope = W_UK c and v = W_UV c: their errors join the operands'.

    A sum of C = kv_lora_rank products moves k_nope by at most ((1 + u)^(1.1 C + 2) - 1) * |W_UK| |c|, and a latent
    that is dequantised and then rounded moves it by one roundoff of key_dtype more of the same. The latent's scale
    may be multiplied into every projected row, as our kernel does, and costs a rounding there. What rounds the
    finished k and v (key_dtype, value_dtype) is counted with the errors of every other kernel that rounds them.
    """
    arguments = part.arguments
    q_nope, q_pe, latent_cache = (arguments[name] for name in ("q_nope", "q_pe", "latent_cache"))
    w_uk, w_uv = arguments["w_uk"], arguments["w_uv"]
    batch, rules = arguments["batch"], arguments["rules"]
    scales = arguments.get("scales") or Scales()
    scaled = _count(scales.k)
    is_float8 = latent_cache.dtype == FLOAT8
    terms = sum_steps(w_uk.shape[2])
    scaling = 2 * U * scaled
    key_relative = math.expm1(terms * contract.u_score) + _roundoff(contract.key_dtype, is_float8) + scaling
    value_relative = math.expm1(terms * contract.u_value) + _roundoff(contract.value_dtype, is_float8) + scaling
    if contract.tf32:
        key_relative, value_relative = (relative + 2 * TF32 + TF32**2 for relative in (key_relative, value_relative))
    rope = q_pe.shape[2]
    rank = w_uk.shape[2]
    for rows in latent_rows(q_nope, q_pe, latent_cache, rank, batch, rules, scales, requests=part.requests):
        sizes = decompress(replace(rows, k=rows.k.abs(), v=rows.v.abs()), w_uk.abs(), w_uv.abs())
        key_error = key_relative * sizes.k
        key_error[..., key_error.shape[-1] - rope :] = 0.0  # k_pe is stored, not computed
        operands = Operands(
            score_scales=_count(scales.q, scales.k),
            value_scales=scaled,
            key_error=key_error,
            value_error=value_relative * sizes.v,
        )
        yield decompress(rows, w_uk, w_uv), operands


def _roundoff(dtype: str, is_rounded: bool) -> float:
    """Of one rounding, and its product with the sums' much smaller errors."""
    roundoff = format_of(dtype).roundoff if dtype and is_rounded else 0.0
    return roundoff * (1 + roundoff)


def _count(*scales: Tensor | None) -> int:
    return sum(scale is not None for scale in scales)
