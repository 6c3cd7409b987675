"""The hard bound of merge_states, derived from its own roundings."""

from __future__ import annotations

import torch
from torch import Tensor

from ..candidate import NumericContract
from .formats import FLUSH, U


def merge_bounds(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, lse: Tensor, contract: NumericContract
) -> tuple[Tensor, Tensor]:
    """(bound of the merged out before it is cast, bound of its lse), float64; inputs float64, [..., Dv] and [...].

    Derivation. Let M = max(lse_a, lse_b), d_i = M - lse_i >= 0, l_i = exp(-d_i), L = l_a + l_b and
    w_i = l_i / L. The inputs are taken as they are stored, so only the merge's own roundings count:

    1. A computed l_i carries a factor exp(r_i) at most, where
       r_i = u*(4 d_i + kappa*(|lse_i| + |M|)) + (eps_exp + 2u) + u*(4|lse| + 8).
       The first part is the difference and its conversion to base 2 (kappa as in the contract's
       exponent_roundings), the second is exp and one product, the third pays for the form
       exp(lse_i - lse), whose lse is itself rounded.
    2. As for attention rows (docs/bound.md), numerator and denominator share these factors, so
       out moves by at most E1 = sum_i w_i expm1(r_i) (|o_i| + |o|) / sum_i w_i exp(-r_i).
    3. Two products, one sum, the denominator's sum, and a division of at most 2 units in the last place:
       8u relative to sum_i w_i |o_i| + E1, and FLUSH absolute for each of them.
    4. lse = M + log(L): the weights' part max(log(sum w_i exp(r_i)), -log(sum w_i exp(-r_i))), then the sum,
       the logarithm and the conversions to and from base 2: u*(6|lse| + 6|M| + 16).

    A part whose lse is -inf has weight 0 and an output that is not read, one whose lse is +inf has weight 1.
    Rows that are empty on both sides are (0, -inf) exactly, and so is a +inf lse.
    """
    pair = torch.stack((lse_a, lse_b))
    maximum = pair.amax(dim=0)
    exact = ~maximum.isfinite()
    largest = torch.where(exact, 0.0, maximum)
    present = pair.isfinite() & ~exact
    logs = torch.where(present, pair, largest)
    size = torch.where(exact, 0.0, lse).abs()
    distance = largest - logs
    errors = U * (4 * distance + contract.exponent_roundings * (logs.abs() + largest.abs()))
    errors = errors + contract.exp_error + 2 * U + U * (4 * size + 8)
    weights = torch.where(present, torch.exp(-distance), 0.0)
    weights = weights / torch.where(exact, 1.0, weights.sum(dim=0))
    growth = torch.expm1(errors)
    least = torch.where(exact, 1.0, (weights / (1 + growth)).sum(dim=0))

    # A part of weight 0 may hold NaN; one of lse +inf is copied through the same products with weight 1.
    takes_all = pair == torch.inf
    share = torch.where(takes_all, 1.0, weights)
    parts = torch.where((share > 0)[..., None], torch.stack((out_a, out_b)), 0.0).abs()
    mean = (share[..., None] * parts).sum(dim=0)
    moved = weights * growth
    shifted = ((moved[..., None] * parts).sum(dim=0) + moved.sum(dim=0)[..., None] * mean) / least[..., None]
    bound = shifted + 8 * U * (mean + shifted) + 4 * FLUSH
    empty = (maximum == -torch.inf)[..., None]
    gained = torch.log1p(moved.sum(dim=0))
    lse_bound = torch.maximum(gained, -torch.log(least)) + U * (6 * size + 6 * largest.abs() + 16)
    return torch.where(empty, 0.0, bound), torch.where(exact, 0.0, lse_bound)
