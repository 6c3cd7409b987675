"""Paged attention as Triton kernels; the meaning is reference/attention.py's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..reference.problem import Batch, Rules, Scales
from ..reference.validation import check_attention
from . import operators
from .call import Call, arithmetic_of, run
from .kernels.arguments import paged_kv, queries
from .launch import STEP_SCHEMA, StepArguments, launch_step, read_step
from .plan import Plan
from .shapes import Shape
from .tile_table import Operands
from .tuning import architecture


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
    call = Call(batch, rules, scales, out, lse, plan, validate)
    sizes = check_attention(q=q, k_cache=k_cache, v_cache=v_cache, **call.to_check)
    return run("attention", (q, k_cache, v_cache), call, sizes, sizes.num_kv_heads)


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, arguments: StepArguments) -> None:
    """The launches of one step of attention over paged keys and values."""
    num_kv_heads = k_cache.shape[2]
    shape = Shape(
        num_kv_heads=num_kv_heads,
        group=q.shape[1] // num_kv_heads,
        head_size=q.shape[2],
        head_size_v=v_cache.shape[3],
        block_size=k_cache.shape[1],
        arithmetic=arithmetic_of(q),
        architecture=architecture(q.device),
        operands=Operands.LOADED if k_cache.dtype == arithmetic_of(q) else Operands.COMPUTED,
    )
    launch_step(queries(q), paged_kv(k_cache, v_cache), shape, arguments)


def _run_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, *flat: Any) -> None:
    attend(q, k_cache, v_cache, read_step(*flat))


operators.define("attention", f"Tensor q, Tensor k_cache, Tensor v_cache, {STEP_SCHEMA}", _run_attention)
