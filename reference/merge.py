"""What it means to join attention over two disjoint sets of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .casting import narrow
from .validation import check_lse_values, check_merge_states


@torch.no_grad()
def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, validate: bool = False
) -> tuple[Tensor, Tensor]:
    """out and lse of the union, from both parts' out [num_tokens, num_query_heads, head_size_v] and lse.

    lse [num_tokens, num_query_heads] float32 (float64 beside a float64 out). A part with lse -inf contributes
    nothing, whatever its out holds; two such give (0, -inf); a part with lse +inf takes all the weight (both
    share it evenly). At most one part may have had the sink in its lse. Returns fresh tensors, computed in
    float64 and cast once. Raises ValueError or TypeError on bad input; `validate` looks for NaN in lse.
    """
    check_merge_states(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    if validate:
        check_lse_values(lse_a=lse_a, lse_b=lse_b)
    wide_a, wide_b = lse_a.double(), lse_b.double()
    maximum = torch.maximum(wide_a, wide_b)
    weight_a, weight_b = _weight(wide_a, maximum), _weight(wide_b, maximum)
    total = weight_a + weight_b
    weighted = _times(weight_a, out_a) + _times(weight_b, out_b)
    out = weighted / torch.where(total > 0, total, 1.0)[..., None]
    lse = maximum + torch.log(total)
    return narrow(out, out_a.dtype), lse.to(lse_a.dtype)


def _weight(lse: Tensor, maximum: Tensor) -> Tensor:
    """exp(lse - maximum); where both are the same infinity, +inf weighs 1 and -inf nothing."""
    weight = torch.where(lse == maximum, 1.0, torch.exp(lse - maximum))
    return torch.where(lse == -torch.inf, 0.0, weight)


def _times(weight: Tensor, out: Tensor) -> Tensor:
    """weight * out, 0 where the weight is 0 whatever out holds."""
    weight = weight[..., None]
    return torch.where(weight == 0, 0.0, weight * out.double())
