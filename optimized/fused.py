"""KV update and attention of a layer as one operator: the two operations of the contract, one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..reference.problem import Batch, Rules, Scales
from ..reference.validation import KERNEL_DTYPES, check_attention, check_slots, check_update_kv_cache
from . import operators
from .attention import attend
from .call import Call, run
from .kernels.arguments import DeviceScales
from .kv_cache import update_rows
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
    call = Call(batch, rules, scales, out, lse, plan, validate)
    sizes = check_attention(q=q, k_cache=k_cache, v_cache=v_cache, **call.to_check)
    if validate:
        check_slots(slot_mapping, num_blocks=sizes.num_blocks, block_size=sizes.block_size)
    tensors = (q, key, value, k_cache, v_cache, slot_mapping)
    return run("attention_with_kv_update", tensors, call, sizes, sizes.num_kv_heads)


def _run(
    q: Tensor, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *flat: Any
) -> None:
    arguments = read_step(*flat)
    scales = DeviceScales(k=arguments.scales.k, v=arguments.scales.v)
    update_rows(key, value, k_cache, v_cache, slot_mapping, scales)
    attend(q, k_cache, v_cache, arguments)


operators.define(
    "attention_with_kv_update",
    f"Tensor q, Tensor key, Tensor value, Tensor(c!) k_cache, Tensor(d!) v_cache, Tensor slot_mapping, {STEP_SCHEMA}",
    _run,
)
