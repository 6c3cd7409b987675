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

# The elements of a row share the roundings of its weights, and values of few bits that one weight multiplies are
# rounded alike: rows of which fewer than so many keys make up the answer are not counted.
EFFECTIVE_KEYS = 16

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
        # Of each row: per element what counts at its worst, and the variance of the rest; then by how much the
        # bound of its lse is narrower, and whether it is counted.
        columns = 2 * self.width + 2
        self.rows = torch.zeros(num_tokens + 1, num_query_heads, columns, dtype=torch.float64, device=out.device)

    def add(self, answer: Answer, bounds: RowBounds) -> None:
        """One chunk, with its hard bounds before the cast.

        From the hard bound is taken off what it has too much: the roundings of P and V, and what of the sums'
        roundings is not one-sided. What is left, with all products of several errors in it, counts at its worst.
        """
        exact, n, tiles = bounds.scalars.exact, bounds.scalars.num_keys, bounds.scalars.num_tiles
        in_row_sum = self._row_sum_excess(n + tiles)
        in_values = (1 + self.u_p) * (1 + self.u_v) * self._value_excess(n, tiles) + (self.u_p + self.u_v)
        in_values = (in_values / bounds.least)[..., None]
        linear = torch.addcmul(bounds.out, in_values, bounds.values, value=-1)
        linear = torch.addcmul(linear, in_row_sum[..., None], answer.out.abs(), value=-1)
        squares = answer.weights.p.square()
        if self.u_p > 0 or self.u_v > 0:
            # Of relative errors that are uniform up to the roundoffs of a weight and a value.
            of_one = (self.u_p**2 + self.u_v**2) / 3
            variance = weigh(squares, answer.rows.v.square()) * (of_one / bounds.least.square())[..., None]
        else:
            variance = torch.zeros_like(linear)
        narrower, counted = in_row_sum.masked_fill(exact, 0.0), _many_matter(squares) & ~exact
        columns = torch.cat((linear, variance, narrower[..., None], counted[..., None]), dim=-1)
        scatter(self.rows, answer.rows, columns)

    def finish(self, out: Tensor, bounds: dict[str, Tensor]) -> Statistics:
        """`out` [num_tokens, num_query_heads, head_size_v] before its cast, and the hard bounds after it."""
        linear, variance, rest = self.rows[:-1].split((self.width, self.width, 2), dim=-1)
        size, hard, cast = out.abs(), bounds["out"], self.cast
        # Equal weights are rounded alike, which moves every output by the same part of itself.
        bound = linear + LAMBDA * variance.sqrt() + self.u_p * size
        bound = bound + cast.roundoff * (size + bound) + cast.underflow
        bound = torch.minimum(bound, hard).masked_fill(hard.isinf(), torch.inf)
        spacing = (2 * cast.roundoff * _power_of_two(size)).clamp(min=2 * cast.underflow)
        variance = variance + (linear / 3).square() + spacing.square() / 12
        narrower, counted = rest.unbind(dim=-1)
        return Statistics(
            bounds={"out": bound, "lse": bounds["lse"] - narrower}, sigma=variance.sqrt(), counted=counted > 0
        )

    def _value_excess(self, num_keys: Tensor, num_tiles: Tensor) -> Tensor:
        """Relative to sum P |v|: what the hard bound allows the sums of P @ V beyond what they do.

        A tensor core truncates its sum once for every 16 keys, always towards zero; the 16 products, which it
        truncates before, have signs of their own. Where each addition is rounded to nearest, all cancel.
        """
        u_value = self.contract.u_value
        worst = value_steps(num_keys, num_tiles)
        if u_value <= U:
            likely = LAMBDA * (num_keys + num_tiles).sqrt()
        else:
            likely = num_keys / 16 + num_tiles + LAMBDA * num_keys.sqrt()
        return u_value * (worst - likely).clamp(min=0)

    def _row_sum_excess(self, additions: Tensor) -> Tensor:
        """Relative: the same of the row sum, which has one sign; nothing where its additions truncate."""
        u_sum = self.contract.u_sum
        if u_sum > U:
            return torch.zeros_like(additions)
        return u_sum * (additions - LAMBDA * additions.sqrt()).clamp(min=0)


def _many_matter(squares: Tensor) -> Tensor:
    """[..., L] squared weights: whether their roundings come to those of `EFFECTIVE_KEYS` equal keys or more."""
    norm: Tensor = torch.linalg.vector_norm(squares, dim=-1)
    return squares.sum(dim=-1) >= math.sqrt(EFFECTIVE_KEYS) * norm


def _power_of_two(size: Tensor) -> Tensor:
    """The largest power of two that is no larger; 0 of 0 and of float64's subnormals."""
    return size.view(torch.int64).bitwise_and(_EXPONENT).view(torch.float64)
