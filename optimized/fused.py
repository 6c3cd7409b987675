"""KV update and attention of a layer as one operator: the two operations of the contract, one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..reference.problem import Batch, Rules, Scales
from ..reference.validation import KERNEL_DTYPES, check_attention, check_slots, check_update_kv_cache
from . import operators
from .attention import answer_tensors, attend, check_values, flatten, prepare
from .kv_cache import run_update
from .launch import STEP_SCHEMA, read_step
from .plan import Plan


def attention_with_kv_update(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    batch: Batch,
    rules: Rules,
    *,
    scales: Scales | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    plan: Plan | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """`update_kv_cache`, then `attention` over what it has just written: the same launches, bit for bit.

    One operator instead of two is one node: a step that is split or broken at its operators has one eager piece per
    layer. Arguments, result and errors are those of the two; everything is checked before anything is written.
    """
    check_update_kv_cache(
        key=key, value=value, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping, scales=scales,
        dtypes=KERNEL_DTYPES,
    )  # fmt: skip
    sizes = check_attention(
        q=q, k_cache=k_cache, v_cache=v_cache, batch=batch, rules=rules, scales=scales, out=out, lse=lse,
        dtypes=KERNEL_DTYPES,
    )  # fmt: skip
    if validate:
        check_slots(slot_mapping, num_blocks=sizes.num_blocks, block_size=sizes.block_size)
        check_values(batch, rules, scales, sizes)
    plan = prepare(q, batch, sizes, plan, sizes.num_kv_heads)
    out, lse = answer_tensors(q, sizes, out, lse)
    flat = flatten(batch, rules, scales, plan, out, lse)
    operators.call("attention_with_kv_update", q, key, value, k_cache, v_cache, slot_mapping, *flat)
    return out, lse


def _run(
    q: Tensor, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *flat: Any
) -> None:
    step = read_step(*flat)
    run_update(key, value, k_cache, v_cache, slot_mapping, step.scales.k, step.scales.v)
    attend(q, k_cache, v_cache, step)


operators.define(
    "attention_with_kv_update",
    f"Tensor q, Tensor key, Tensor value, Tensor(c!) k_cache, Tensor(d!) v_cache, Tensor slot_mapping, {STEP_SCHEMA}",
    _run,
)
