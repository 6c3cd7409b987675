"""What errors come to where the roundings are independent: a narrower bound, and how large errors should be.

docs/bound.md, "Independent roundings". A worst case has every rounding of P and V push the same way, and so does
not shrink with the number of keys. Independent ones mostly cancel: this is what shows one wrong key in thousands.
It holds for generic values only (`why_not_generic`), and is asked beside the hard bound, never instead of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...reference.attention import Answer, scatter, weigh
from ..candidate import NumericContract
from ..case import FLOAT8, Case
from .formats import U, format_of
from .rows import RowBounds, probability_format, value_steps

# A sum of independent roundings leaves so many standard deviations once in 4e13 times: 2 exp(-LAMBDA**2 / 2).
LAMBDA = 8.0

# Largest root mean square of error / sigma that is let pass: of one row, and of all rows together.
ROW_Z = 1.5
CASE_Z = 1.05

# Too few errors have no reliable mean. Rows of fewer elements have no z; cases of fewer rows or elements neither.
ROW_ELEMENTS = 64
CASE_ROWS = 64
CASE_ELEMENTS = 4096

# The elements of a row share the roundings of its weights: rows where fewer than so many matter are not counted.
EFFECTIVE_KEYS = 8

_EXPONENT = 0x7FF0000000000000  # the bits of a float64 that hold its exponent


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Bounds that independent roundings keep, and the size of their errors; float64, by token and query head.

    `bounds` (of "out" and "lse") are nowhere wider than the hard ones. `sigma` is meaningful in the rows that
    are `counted` only.
    """

    bounds: dict[str, Tensor]
    sigma: Tensor  # [num_tokens, num_query_heads, head_size_v]: standard deviation of out's error, not understated
    counted: Tensor  # [num_tokens, num_query_heads] bool: rows with enough independent roundings for a z


def why_not_generic(case: Case, contract: NumericContract) -> str | None:
    """Why independent roundings cannot be assumed for this case, in one sentence; None if they can.

    Equal scores, values that are equal or of one sign, and keys that occur twice make roundings go the same way;
    truncation always does.
    """
    spec = case.spec
    if spec.operation not in ("attention", "mla_attention"):
        return f"{spec.operation}: its errors are not those of P and V alone"
    if case.recipe not in ("normal", "needle"):
        return f"recipe {case.recipe}: its values are designed, so their roundings are not independent"
    if case.batch.shared_blocks >= 2:
        return "shared_blocks: a table may have a page twice, whose keys have their roundings in common"
    if (spec.out_dtype or spec.dtype) == FLOAT8:
        return "out_dtype: a float8 output has no room for smaller errors than its own rounding"
    if contract.tf32:
        return "tf32: truncated operands all err towards zero"
    if contract.key_dtype:
        return "key_dtype: keys that are rounded again move the weights by more than the roundings of P"
    return None


class Gatherer:
    """Collects the rows of a case chunk by chunk, and makes its `Statistics` of them."""

    def __init__(self, out: Tensor, contract: NumericContract) -> None:
        """`out`: the output [num_tokens, num_query_heads, head_size_v] of the case."""
        num_tokens, num_query_heads, self.width = out.shape
        self.cast, self.contract = format_of(out.dtype), contract
        self.u_p = probability_format(contract).roundoff
        self.u_v = format_of(contract.value_dtype).roundoff if contract.value_dtype else 0.0
        # Of each row: per element what counts at its worst, and the standard deviation of the rest; then by how
        # much the bound of its lse is narrower, and whether it is counted.
        columns = 2 * self.width + 2
        self.rows = torch.zeros(num_tokens + 1, num_query_heads, columns, dtype=torch.float64, device=out.device)

    def add(self, answer: Answer, bounds: RowBounds) -> None:
        """One chunk, with its hard bounds before the cast.

        From the hard bound is taken off what it has too much: the roundings of P and V, and what of the sums'
        roundings is not one-sided. What is left, with all products of several errors in it, counts at its worst.
        """
        scalars, least = bounds.scalars, bounds.least[..., None]
        n, tiles = scalars.num_keys, scalars.num_tiles
        worst, likely = (torch.expm1(steps * self.contract.u_value) for steps in self._value_steps(n, tiles))
        excess = (1 + self.u_p) * (1 + self.u_v) * (worst - likely) + self.u_p + self.u_v
        summing = self._row_sum_excess(n + tiles)
        linear = bounds.out - excess[..., None] * bounds.values / least - summing[..., None] * answer.out.abs()
        random, counted = torch.zeros_like(linear), ~scalars.exact
        if self.u_p > 0 or self.u_v > 0:
            squares = answer.weights.p.square()
            random = weigh(squares, answer.rows.v.square()).sqrt() * self._deviation / least
            if self.u_p > 0:
                counted = counted & _many_matter(squares)
        narrower = torch.where(scalars.exact, 0.0, summing)
        scatter(self.rows, answer.rows, torch.cat((linear, random, narrower[..., None], counted[..., None]), dim=-1))

    def finish(self, out: Tensor, bounds: dict[str, Tensor]) -> Statistics:
        """`out` [num_tokens, num_query_heads, head_size_v] before its cast, and the hard bounds after it."""
        linear, random, rest = self.rows[:-1].split((self.width, self.width, 2), dim=-1)
        size = out.abs()
        # Equal weights are rounded alike: that moves every output by as much as its own part of them.
        bound = linear + LAMBDA * random + self.u_p * size
        bound = bound + self.cast.roundoff * (size + bound) + self.cast.underflow
        hard = bounds["out"]
        bound = torch.where(hard.isinf(), torch.inf, torch.minimum(bound, hard))
        spacing = (2 * self.cast.roundoff * _power_of_two(size)).clamp(min=2 * self.cast.underflow)
        variance = random.square() + (linear / 3).square() + spacing.square() / 12
        narrower, counted = rest.unbind(dim=-1)
        return Statistics(
            bounds={"out": bound, "lse": bounds["lse"] - narrower}, sigma=variance.sqrt(), counted=counted > 0
        )

    @property
    def _deviation(self) -> float:
        """Of the relative errors of one weight and one value, both uniform up to their roundoffs."""
        return math.hypot(self.u_p, self.u_v) / math.sqrt(3)

    def _value_steps(self, num_keys: Tensor, num_tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Roundings of P @ V's sums that count: at their worst, and as they are.

        A tensor core truncates its sum once for every 16 keys, always towards zero; the 16 products, which it
        truncates before, have signs of their own. Where each addition is rounded to nearest, all cancel.
        """
        worst = value_steps(num_keys, num_tiles)
        if self.contract.u_value <= U:
            return worst, torch.minimum(worst, LAMBDA * (num_keys + num_tiles).sqrt())
        return worst, torch.minimum(worst, num_keys / 16 + num_tiles + LAMBDA * num_keys.sqrt())

    def _row_sum_excess(self, additions: Tensor) -> Tensor:
        """Relative; what the hard bound allows the row sum beyond independent roundings. None if they truncate."""
        if self.contract.u_sum > U:
            return torch.zeros_like(additions)
        return self.contract.u_sum * (additions - LAMBDA * additions.sqrt()).clamp(min=0)


def _many_matter(squares: Tensor) -> Tensor:
    """[..., L] squared weights: whether their roundings come to those of `EFFECTIVE_KEYS` equal keys or more."""
    return squares.sum(dim=-1) >= math.sqrt(EFFECTIVE_KEYS) * torch.linalg.vector_norm(squares, dim=-1)


def _power_of_two(size: Tensor) -> Tensor:
    """The largest power of two that is no larger; 0 of 0 and of float64's subnormals."""
    return (size.view(torch.int64) & _EXPONENT).view(torch.float64)
