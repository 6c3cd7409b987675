"""What every attention operation does with its caller's arguments between checking them and calling its operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.problem import FLOAT8, Batch, Rules, Scales
from ..reference.validation import KERNEL_DTYPES, Sizes, check_batch_values
from . import operators
from .launch import require_device
from .plan import LARGEST_SEQ_LEN, Capacity, Plan, check_plan, make_plan


class Call(NamedTuple):
    """The arguments that all attention operations share, as they were given."""

    batch: Batch
    rules: Rules
    scales: Scales | None
    out: Tensor | None
    lse: Tensor | None
    plan: Plan | None
    validate: bool

    @property
    def to_check(self) -> dict[str, Any]:
        """Keywords of the reference's check of an attention operation."""
        return {
            "batch": self.batch,
            "rules": self.rules,
            "scales": self.scales,
            "out": self.out,
            "lse": self.lse,
            "dtypes": KERNEL_DTYPES,
        }


def run(
    name: str, tensors: tuple[Tensor, ...], call: Call, sizes: Sizes, request_programs: int
) -> tuple[Tensor, Tensor]:
    """Call the operator `name` on its own `tensors`, q first, and the shared arguments: (out, lse).

    sizes: what the checks found. request_programs: what a plan is made with, if none was given.
    """
    q = tensors[0]
    if call.validate:
        check_values(call, sizes)
    plan = _prepared(q, call, sizes, request_programs)
    out, lse = _answer_tensors(q, call, sizes)
    operators.call(name, *tensors, *_flatten(call, plan, out, lse))
    return out, lse


def check_values(call: Call, sizes: Sizes) -> None:
    """What lies on the device; synchronises."""
    check_batch_values(
        call.batch,
        call.rules,
        num_tokens=sizes.num_tokens,
        num_blocks=sizes.num_blocks,
        block_size=sizes.block_size,
        scales=call.scales,
    )


def _prepared(q: Tensor, call: Call, sizes: Sizes, request_programs: int) -> Plan:
    """The plan that was given, if it fits, or a new one."""
    require_device("q", q)
    if call.plan is not None:
        return check_plan(call.plan, call.batch, num_tokens=sizes.num_tokens, block_size=sizes.block_size)
    longest = min(call.batch.max_blocks * sizes.block_size, LARGEST_SEQ_LEN)
    capacity = Capacity(sizes.num_tokens, call.batch.num_requests, longest)
    return make_plan(call.batch, capacity, request_programs=request_programs)


def _answer_tensors(q: Tensor, call: Call, sizes: Sizes) -> tuple[Tensor, Tensor]:
    out, lse = call.out, call.lse
    rows = (sizes.num_tokens, sizes.num_query_heads)
    if out is None:
        out = q.new_empty((*rows, sizes.head_size_v), dtype=torch.bfloat16 if q.dtype == FLOAT8 else q.dtype)
    if lse is None:
        lse = q.new_empty(rows, dtype=torch.float32)
    return out, lse


def _flatten(call: Call, plan: Plan, out: Tensor, lse: Tensor) -> tuple[Any, ...]:
    """The arguments of launch.STEP_SCHEMA, in its order."""
    batch, rules, scales = call.batch, call.rules, call.scales or Scales()
    return (
        batch.block_table,
        *(float(rules.softmax_scale), rules.causal, rules.sliding_window, rules.right_window, rules.softcap),
        *(rules.alibi_slopes, rules.sinks, rules.query_bias),
        *(scales.q, scales.k, scales.v, scales.out),
        *(*plan.tensors, out, lse),
    )


def arithmetic_of(q: Tensor, default: torch.dtype = torch.float16) -> torch.dtype:
    """What tl.dot multiplies: q's format; every float8 value is exact in the wider `default`."""
    return default if q.dtype == FLOAT8 else q.dtype
