"""Multi-head latent attention as Triton kernels; the meaning is reference/mla.py's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..reference.problem import Batch, Rules, Scales
from ..reference.validation import check_mla_attention, check_mla_attention_decompressed
from . import operators
from .call import Call, arithmetic_of, run
from .kernels.arguments import NO_SCALE, latent_kv, queries
from .launch import STEP_SCHEMA, launch_step, read_step
from .plan import Plan
from .shapes import Shape
from .tile_table import Operands
from .tuning import architecture, request_programs


def mla_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    batch: Batch,
    rules: Rules,
    *,
    scales: Scales | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    plan: Plan | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Absorbed MLA: every query head attends to the latent rows, which are keys and values at once.

    q_nope [num_tokens, num_query_heads, kv_lora_rank], already times W_UK; q_pe [.., qk_rope_head_dim];
    latent_cache [num_blocks, block_size, kv_lora_rank + qk_rope_head_dim], any strides, q's dtype or float8_e4m3fn.
    rules.softmax_scale comes from the decompressed head (qk_nope + qk_rope). scales.k serves the whole row.

    Returns out [num_tokens, num_query_heads, kv_lora_rank], still to be multiplied with W_UV, and lse as
    `attention` does; `plan`, `validate` and errors likewise.
    """
    call = Call(batch, rules, scales, out, lse, plan, validate)
    sizes = check_mla_attention(q_nope=q_nope, q_pe=q_pe, latent_cache=latent_cache, **call.to_check)
    programs = request_programs("mla_attention", num_query_heads=sizes.num_query_heads, num_kv_heads=1)
    return run("mla_attention", (q_nope, q_pe, latent_cache), _scaled_by_row(call), sizes, programs)


def mla_attention_decompressed(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    batch: Batch,
    rules: Rules,
    *,
    scales: Scales | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    plan: Plan | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """MLA with each head's keys and values projected up from the latent rows: k = [W_UK c ; k_pe], v = W_UV c.

    q_nope [num_tokens, num_query_heads, qk_nope_head_dim], before W_UK; q_pe and latent_cache as in
    `mla_attention`; w_uk [num_query_heads, qk_nope_head_dim, kv_lora_rank], w_uv [num_query_heads, v_head_dim,
    kv_lora_rank], of q's dtype. Projected keys and values are rounded to that dtype.

    Returns out [num_tokens, num_query_heads, v_head_dim] and lse as `attention` does; the rest likewise.
    """
    call = Call(batch, rules, scales, out, lse, plan, validate)
    sizes = check_mla_attention_decompressed(
        q_nope=q_nope, q_pe=q_pe, latent_cache=latent_cache, w_uk=w_uk, w_uv=w_uv, **call.to_check
    )
    tensors = (q_nope, q_pe, latent_cache, w_uk, w_uv)
    return run("mla_attention_decompressed", tensors, _scaled_by_row(call), sizes, sizes.num_query_heads)


def _scaled_by_row(call: Call) -> Call:
    """The cache row's one scale is that of its values too."""
    scales = call.scales
    return call if scales is None else call._replace(scales=Scales(q=scales.q, k=scales.k, v=scales.k, out=scales.out))


def _run_absorbed(q_nope: Tensor, q_pe: Tensor, latent_cache: Tensor, *flat: Any) -> None:
    rank = q_nope.shape[2]
    shape = Shape(
        num_kv_heads=1,
        group=q_nope.shape[1],
        head_size=rank,
        head_size_v=rank,
        block_size=latent_cache.shape[1],
        arithmetic=arithmetic_of(q_nope),
        architecture=architecture(q_nope.device),
        operands=Operands.LATENT if latent_cache.dtype == arithmetic_of(q_nope) else Operands.CAST_LATENT,
        rope_size=q_pe.shape[2],
    )
    launch_step(queries(q_nope, q_pe), latent_kv(latent_cache, rank), shape, read_step(*flat))


def _run_decompressed(
    q_nope: Tensor, q_pe: Tensor, latent_cache: Tensor, w_uk: Tensor, w_uv: Tensor, *flat: Any
) -> None:
    num_heads, head_size, rank = w_uk.shape
    # Each query head has keys of its own, all from the same rows: as many kv heads as query heads, stride 0.
    shape = Shape(
        num_kv_heads=num_heads,
        group=1,
        head_size=head_size,
        head_size_v=w_uv.shape[1],
        block_size=latent_cache.shape[1],
        arithmetic=arithmetic_of(q_nope, default=w_uk.dtype),
        architecture=architecture(q_nope.device),
        operands=Operands.COMPUTED,
        rope_size=q_pe.shape[2],
        rank=rank,
    )
    arguments = read_step(*flat)
    # The values were scaled before they were rounded; only the output's scale is left for the store.
    arguments = arguments._replace(scales=arguments.scales._replace(v=NO_SCALE))
    launch_step(queries(q_nope, q_pe), latent_kv(latent_cache, rank, w_uk, w_uv), shape, arguments)


_ROWS = "Tensor q_nope, Tensor q_pe, Tensor latent_cache"
operators.define("mla_attention", f"{_ROWS}, {STEP_SCHEMA}", _run_absorbed)
operators.define("mla_attention_decompressed", f"{_ROWS}, Tensor w_uk, Tensor w_uv, {STEP_SCHEMA}", _run_decompressed)
