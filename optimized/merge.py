"""Merging two partial attention results by their lse; the meaning is reference/merge.py's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.validation import KERNEL_DTYPES, check_lse_values, check_merge_states
from . import operators
from .kernels.arguments import outputs
from .kernels.merge import merge_pair
from .launch import device_guard, require_device
from .launching import launch
from .shapes import row_constants
from .tuning import num_programs


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, validate: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each.

    out_a, out_b [num_tokens, num_query_heads, head_size_v]; lse_a, lse_b [num_tokens, num_query_heads] float32,
    natural log. A part with lse -inf contributes nothing, even if its out is NaN; two such parts give (0, -inf);
    lse +inf takes all weight. At most one part carries the sink.
    Returns (out, lse), new tensors. Raises ValueError or TypeError on bad input.
    """
    check_merge_states(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b, dtypes=KERNEL_DTYPES)
    require_device("out_a", out_a)
    if validate:
        check_lse_values(lse_a=lse_a, lse_b=lse_b)
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    operators.call("merge_states", out_a, lse_a, out_b, lse_b, out, lse)
    return out, lse


def _run_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    num_tokens, num_query_heads, head_size_v = out.shape
    num_rows = num_tokens * num_query_heads
    if num_rows == 0:
        return

    with device_guard(out):
        launch(
            merge_pair,
            num_programs(out.device),
            (outputs(out_a, lse_a), outputs(out_b, lse_b), outputs(out, lse)),
            (num_rows,),
            row_constants(num_query_heads, head_size_v),
        )


operators.define(
    "merge_states",
    "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor(a!) out, Tensor(b!) lse",
    _run_merge,
)
