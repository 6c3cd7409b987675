"""Attention with a plan takes the lengths of the plan, whatever has become of the batch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pageproof import optimized
from pageproof.optimized import Batch, Capacity, make_plan
from pageproof.optimized.tuning import plan_limits
from pageproof.oracle import BatchShape, Case, Spec
from pageproof.oracle.building.tensors import build

SPECS = {
    "attention": Spec(head_size=16, head_size_v=16, num_kv_heads=2, group_size=3, sliding_window=70),
    "mla_attention": Spec(operation="mla_attention", group_size=3, num_kv_heads=1, head_size=32, rope_head_size=16),
}


def planned(operation: str, device: torch.device) -> tuple[dict[str, Any], Batch, optimized.Plan]:
    """A call without its batch, its batch, and a plan: prefill, whole and split requests, and rows of padding."""
    several = 2 * plan_limits().split_base + 5
    lengths = BatchShape(query_lens=(1, 20, 0, 3), seq_lens=(several, 30, 0, 9), padding_tokens=4)
    arguments = dict(build(Case(spec=SPECS[operation], batch=lengths, seed=1), device).arguments)
    batch = arguments.pop("batch")
    return arguments, batch, make_plan(batch, Capacity(28, 4, several))


@pytest.mark.parametrize("operation", SPECS)
def test_lengths_may_change_once_there_is_a_plan(operation: str, pageproof_device: torch.device) -> None:
    arguments, batch, plan = planned(operation, pageproof_device)
    call = getattr(optimized, operation)
    out, lse = (each.clone() for each in call(**arguments, batch=batch, plan=plan))
    batch.cu_seqlens_q.fill_(-1)
    batch.seq_lens.fill_(2**30)
    again = call(**arguments, batch=batch, plan=plan)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)


def test_a_plan_for_other_buffers_is_refused(pageproof_device: torch.device) -> None:
    arguments, batch, plan = planned("attention", pageproof_device)
    fewer = Batch(batch.cu_seqlens_q[:4], batch.seq_lens[:3], batch.block_table[:3])
    with pytest.raises(ValueError, match=r"^plan: found one for 4 requests, expected one for 3$"):
        optimized.attention(**arguments, batch=fewer, plan=plan)
    # A capacity of more requests than the batch has is no plan for those.
    roomy = make_plan(fewer, plan.capacity)
    with pytest.raises(ValueError, match=r"^plan: found one for 3 requests, expected one for 4$"):
        optimized.attention(**arguments, batch=batch, plan=roomy)
