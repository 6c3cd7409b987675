"""Paged attention as Triton kernels; the meaning is reference/attention.py's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.problem import FLOAT8, Batch, Rules, Scales
from ..reference.validation import KERNEL_DTYPES, Sizes, check_attention, check_batch_values
from . import operators
from .kernels.arguments import paged_kv, queries
from .launch import STEP_SCHEMA, Shape, Step, launch_step, read_step, require_device
from .plan import LARGEST_SEQ_LEN, Capacity, Plan, check_plan, make_plan


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    rules: Rules,
    *,
    scales: Scales | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    plan: Plan | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of every request's new tokens over its cached keys.

    q [num_tokens, num_query_heads, head_size] float32, float16, bfloat16, or float8_e4m3fn beside float8 caches;
    k_cache [num_blocks, block_size, num_kv_heads, head_size], v_cache the same with head_size_v, of q's dtype or
    float8_e4m3fn, with any strides.

    Returns out [num_tokens, num_query_heads, head_size_v] (`out` if given; else q's dtype, bfloat16 for a float8 q)
    and lse [num_tokens, num_query_heads] float32, natural log, sink included. Rows of no request: 0 and -inf.
    `plan`: from make_plan, for a step whose layers share it; None plans inside the call.
    Raises ValueError or TypeError on bad input that the host can see; `validate` looks at lengths, pages,
    biases and scales on the device too, and synchronises.
    """
    sizes = check_attention(
        q=q, k_cache=k_cache, v_cache=v_cache, batch=batch, rules=rules, scales=scales, out=out, lse=lse,
        dtypes=KERNEL_DTYPES,
    )  # fmt: skip
    if validate:
        check_values(batch, rules, scales, sizes)
    plan = prepare(q, batch, sizes, plan, sizes.num_kv_heads)
    out, lse = answer_tensors(q, sizes, out, lse)
    operators.call("attention", q, k_cache, v_cache, *flatten(batch, rules, scales, plan, out, lse))
    return out, lse


def check_values(batch: Batch, rules: Rules, scales: Scales | None, sizes: Sizes) -> None:
    """What lies on the device; synchronises."""
    check_batch_values(
        batch,
        rules,
        num_tokens=sizes.num_tokens,
        num_blocks=sizes.num_blocks,
        block_size=sizes.block_size,
        scales=scales,
    )


def prepare(q: Tensor, batch: Batch, sizes: Sizes, plan: Plan | None, request_programs: int) -> Plan:
    """The plan that was given, if it fits, or a new one."""
    require_device("q", q)
    if plan is not None:
        return check_plan(plan, batch, num_tokens=sizes.num_tokens, block_size=sizes.block_size)
    longest = min(batch.max_blocks * sizes.block_size, LARGEST_SEQ_LEN)
    capacity = Capacity(sizes.num_tokens, batch.num_requests, longest)
    return make_plan(batch, capacity, request_programs=request_programs)


def answer_tensors(q: Tensor, sizes: Sizes, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = (sizes.num_tokens, sizes.num_query_heads)
    if out is None:
        out = q.new_empty((*rows, sizes.head_size_v), dtype=torch.bfloat16 if q.dtype == FLOAT8 else q.dtype)
    if lse is None:
        lse = q.new_empty(rows, dtype=torch.float32)
    return out, lse


def flatten(batch: Batch, rules: Rules, scales: Scales | None, plan: Plan, out: Tensor, lse: Tensor) -> tuple[Any, ...]:
    """The arguments of launch.STEP_SCHEMA, in its order."""
    scales = scales or Scales()
    return (
        *(batch.cu_seqlens_q, batch.seq_lens, batch.block_table),
        *(float(rules.softmax_scale), rules.causal, rules.sliding_window, rules.right_window, rules.softcap),
        *(rules.alibi_slopes, rules.sinks, rules.query_bias),
        *(scales.q, scales.k, scales.v, scales.out),
        *(*plan.tensors, out, lse),
    )


def arithmetic_of(q: Tensor, default: torch.dtype = torch.float16) -> torch.dtype:
    """What tl.dot multiplies: q's format; every float8 value is exact in the wider `default`."""
    return default if q.dtype == FLOAT8 else q.dtype


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: Step) -> None:
    """The launches of one step of attention over paged keys and values."""
    num_kv_heads = k_cache.shape[2]
    shape = Shape(
        num_kv_heads=num_kv_heads,
        group=q.shape[1] // num_kv_heads,
        head_size=q.shape[2],
        head_size_v=v_cache.shape[3],
        block_size=k_cache.shape[1],
        arithmetic=arithmetic_of(q),
        computed_operands=k_cache.dtype != arithmetic_of(q),
    )
    launch_step(queries(q), paged_kv(k_cache, v_cache), shape, step)


def _run_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, *flat: Any) -> None:
    attend(q, k_cache, v_cache, read_step(*flat))


operators.define("attention", f"Tensor q, Tensor k_cache, Tensor v_cache, {STEP_SCHEMA}", _run_attention)
