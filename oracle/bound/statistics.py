"""What errors come to where the roundings are independent: a narrower bound, and how large errors should be.

docs/bound.md, "Independent roundings". A worst case has every rounding of P and V push the same way, and so does
not shrink with the number of keys. Independent ones mostly cancel: this is what shows one wrong key in thousands.
It holds for generic values only (`why_not_generic`), and is asked beside the hard bound, never instead of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..candidate import NumericContract
from ..case import FLOAT8, Case
from .formats import Format, U, format_of
from .rows import RowBounds, value_steps
from .sums import RowSums, probability_format

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
    cases: tuple[int, ...] = ()  # the rows of each case, where they are those of several, one after the other

    def rows(self, first: int, stop: int) -> Statistics:
        """Those of one case of several."""
        bounds = {name: tensor[first:stop] for name, tensor in self.bounds.items()}
        return Statistics(bounds=bounds, sigma=self.sigma[first:stop], counted=self.counted[first:stop])


def why_not_generic(case: Case, contract: NumericContract) -> str | None:
    """Why independent roundings cannot be assumed for this case, in one sentence; None if they can.

    Equal scores, values that are equal or of one sign, and keys that occur twice make roundings go the same way;
    truncation always does.
    """
    spec, batch = case.spec, case.batch
    if spec.operation not in ("attention", "mla_attention"):
        return f"{spec.operation}: its errors are not those of P and V alone"
    if case.recipe not in ("normal", "needle"):
        return f"recipe {case.recipe}: its values are designed, so their roundings are not independent"
    for name, repeats in {"repeated_blocks": batch.repeated_blocks, "shared_blocks": batch.shared_blocks >= 2}.items():
        if repeats:
            return f"{name}: a table may have a page twice, whose keys have their roundings in common"
    if (spec.out_dtype or spec.dtype) == FLOAT8:
        return "out_dtype: a float8 output has no room for smaller errors than its own rounding"
    if contract.tf32:
        return "tf32: truncated operands all err towards zero"
    if contract.key_dtype:
        return "key_dtype: keys that are rounded again move the weights by more than the roundings of P"
    return None


def statistics(
    sums: RowSums, rows: RowBounds, bounds: dict[str, Tensor], cast: Format, contract: NumericContract
) -> Statistics:
    """`rows`: the hard bounds before the cast to the output's format, `bounds`: after it.

    From the hard bound is taken off what it has too much: the roundings of P and V, and what of the sums' roundings
    is not one-sided. What is left, with all products of several errors in it, counts at its worst.
    """
    assert sums.squares is not None
    size, hard = sums.out.abs(), bounds["out"]
    u_p = probability_format(contract).roundoff
    u_v = format_of(contract.value_dtype).roundoff if contract.value_dtype else 0.0
    in_row_sum = _row_sum_excess(sums.num_keys + rows.num_tiles, contract)
    in_values = _value_excess(sums.num_keys, rows.num_tiles, contract).mul_((1 + u_p) * (1 + u_v)).add_(u_p + u_v)
    linear = torch.addcmul(rows.out, in_values.mul_(rows.reciprocal)[..., None], sums.values, value=-1)
    linear.addcmul_(in_row_sum[..., None], size, value=-1)
    # Of relative errors that are uniform up to the roundoffs of a weight and a value.
    variance = sums.squares * (rows.reciprocal.square() * ((u_p**2 + u_v**2) / 3))[..., None]

    # Equal weights are rounded alike, which moves every output by the same part of itself.
    bound = torch.add(linear, variance.sqrt(), alpha=LAMBDA).add_(size, alpha=u_p)
    bound = torch.add(bound, size + bound, alpha=cast.roundoff).add_(cast.underflow)
    bound = torch.fmin(bound, hard).masked_fill_(hard.isinf(), torch.inf)  # NaN in exact rows
    spacing = _power_of_two(size).mul_(2 * cast.roundoff).clamp_(min=2 * cast.underflow)
    variance = variance.addcmul_(linear, linear, value=1 / 9).addcmul_(spacing, spacing, value=1 / 12)
    return Statistics(
        bounds={"out": bound, "lse": bounds["lse"] - in_row_sum.masked_fill(rows.exact, 0.0)},
        sigma=variance.sqrt_(),
        counted=(sums.effective_keys >= EFFECTIVE_KEYS) & ~rows.exact,
    )


def _value_excess(num_keys: Tensor, num_tiles: Tensor, contract: NumericContract) -> Tensor:
    """Relative to sum P |v|: what the hard bound allows the sums of P @ V beyond what they do.

    A tensor core truncates its sum once for every 16 keys, always towards zero; the 16 products, which it
    truncates before, have signs of their own. Where each addition is rounded to nearest, all cancel.
    """
    worst = value_steps(num_keys, num_tiles)
    if contract.u_value <= U:
        likely = LAMBDA * (num_keys + num_tiles).sqrt()
    else:
        likely = torch.add(num_tiles, num_keys, alpha=1 / 16).add_(num_keys.sqrt(), alpha=LAMBDA)
    return (worst - likely).clamp_(min=0).mul_(contract.u_value)


def _row_sum_excess(additions: Tensor, contract: NumericContract) -> Tensor:
    """Relative: the same of the row sum, which has one sign; nothing where its additions truncate."""
    if contract.u_sum > U:
        return torch.zeros_like(additions)
    return torch.add(additions, additions.sqrt(), alpha=-LAMBDA).clamp_(min=0).mul_(contract.u_sum)


def _power_of_two(size: Tensor) -> Tensor:
    """The largest power of two that is no larger; 0 of 0 and of float64's subnormals."""
    return size.view(torch.int64).bitwise_and(_EXPONENT).view(torch.float64)
