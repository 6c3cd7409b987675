"""What every operation asks of its arguments, checked before anything runs; shared with the kernels.

The functions here look only at what the host sees (types, shapes, dtypes, devices, strides), so they cost
microseconds and never synchronise. What lies in device memory is the business of value_checks.py.
`dtypes` are the formats wider than float8 that the caller computes in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .argument_checks import (
    KERNEL_DTYPES,
    REFERENCE_DTYPES,
    Dtypes,
    cache_dtypes,
    check_cache,
    check_cache_pair,
    check_groups,
    check_output,
    check_rows,
    check_rules,
    check_scale,
)
from .errors import bad_value
from .problem import FLOAT8, Batch, Rules, Scales
from .update_validation import check_merge_states, check_update_kv_cache, check_update_mla_cache
from .value_checks import check_batch_values, check_lse_values, check_slots

__all__ = [
    "KERNEL_DTYPES",
    "REFERENCE_DTYPES",
    "Sizes",
    "check_attention",
    "check_batch_values",
    "check_lse_values",
    "check_merge_states",
    "check_mla_attention",
    "check_mla_attention_decompressed",
    "check_slots",
    "check_update_kv_cache",
    "check_update_mla_cache",
]


@dataclass(frozen=True)
class Sizes:
    """The sizes that a checked call of an attention operation agrees on."""

    num_tokens: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int  # q's and k's; kv_lora_rank + qk_rope_head_dim for both MLA operations
    head_size_v: int  # out's
    num_blocks: int
    block_size: int


def check_attention(
    *,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    rules: Rules,
    scales: Scales | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    dtypes: Dtypes = REFERENCE_DTYPES,
) -> Sizes:
    """Raise ValueError or TypeError unless these are arguments of `attention`."""
    check_groups(batch, rules, scales)
    check_rows("q", q, 3, (*dtypes, FLOAT8), batch.device)
    check_cache("k_cache", k_cache, 4, cache_dtypes(q), batch.device)
    check_cache("v_cache", v_cache, 4, cache_dtypes(q), batch.device)
    check_cache_pair(k_cache, v_cache)
    if k_cache.shape[3] != q.shape[2]:
        raise bad_value("k_cache", f"head_size {k_cache.shape[3]}", f"q's head_size {q.shape[2]}")
    num_query_heads, num_kv_heads = q.shape[1], k_cache.shape[2]
    if num_query_heads % num_kv_heads:
        raise bad_value("q", f"{num_query_heads} query heads", f"a multiple of k_cache's {num_kv_heads} kv heads")
    num_blocks, block_size = k_cache.shape[:2]
    sizes = Sizes(q.shape[0], num_query_heads, num_kv_heads, q.shape[2], v_cache.shape[3], num_blocks, block_size)
    _check_outputs(out, lse, sizes, batch.device, dtypes)
    check_rules(rules, sizes.num_tokens, num_query_heads, batch.device)
    if scales is not None:
        check_scale("q", scales.q, q.dtype, num_kv_heads, batch.device)
        check_scale("k", scales.k, k_cache.dtype, num_kv_heads, batch.device)
        check_scale("v", scales.v, v_cache.dtype, num_kv_heads, batch.device)
        check_scale("out", scales.out, _out_dtype(out, q), num_kv_heads, batch.device)
    return sizes


def check_mla_attention(
    *,
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    batch: Batch,
    rules: Rules,
    scales: Scales | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    dtypes: Dtypes = REFERENCE_DTYPES,
) -> Sizes:
    """Raise ValueError or TypeError unless these are arguments of `mla_attention`."""
    check_groups(batch, rules, scales)
    _check_mla_rows(q_nope, q_pe, latent_cache, batch, dtypes)
    rank = q_nope.shape[2]
    sizes = _mla_sizes(q_nope, q_pe, latent_cache, rank, head_size_v=rank, rank_from="q_nope")
    _check_mla_rest(sizes, q_nope, latent_cache, batch, rules, scales, out, lse, dtypes)
    return sizes


def check_mla_attention_decompressed(
    *,
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    batch: Batch,
    rules: Rules,
    scales: Scales | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    dtypes: Dtypes = REFERENCE_DTYPES,
) -> Sizes:
    """Raise ValueError or TypeError unless these are arguments of `mla_attention_decompressed`."""
    check_groups(batch, rules, scales)
    _check_mla_rows(q_nope, q_pe, latent_cache, batch, dtypes)
    weight_dtypes = dtypes if q_nope.dtype == FLOAT8 else (q_nope.dtype,)
    check_cache("w_uk", w_uk, 3, weight_dtypes, batch.device)
    check_cache("w_uv", w_uv, 3, (w_uk.dtype,), batch.device)
    heads, nope = q_nope.shape[1:]
    if w_uk.shape[:2] != (heads, nope):
        raise bad_value("w_uk", f"shape {tuple(w_uk.shape)}", f"({heads}, {nope}, kv_lora_rank) as q_nope has it")
    rank = w_uk.shape[2]
    if (w_uv.shape[0], w_uv.shape[2]) != (heads, rank):
        raise bad_value("w_uv", f"shape {tuple(w_uv.shape)}", f"({heads}, v_head_dim, {rank}) as w_uk has it")
    sizes = _mla_sizes(q_nope, q_pe, latent_cache, rank, head_size_v=w_uv.shape[1], rank_from="w_uk")
    _check_mla_rest(sizes, q_nope, latent_cache, batch, rules, scales, out, lse, dtypes)
    return sizes


def _out_dtype(out: Tensor | None, q: Tensor) -> torch.dtype:
    if out is not None:
        return out.dtype
    return torch.bfloat16 if q.dtype == FLOAT8 else q.dtype


def _check_outputs(out: Tensor | None, lse: Tensor | None, sizes: Sizes, device: torch.device, dtypes: Dtypes) -> None:
    rows = (sizes.num_tokens, sizes.num_query_heads)
    if out is not None:
        check_output("out", out, (*rows, sizes.head_size_v), (*dtypes, FLOAT8), device)
    if lse is not None:
        lse_dtypes = (torch.float32, torch.float64) if torch.float64 in dtypes else (torch.float32,)
        check_output("lse", lse, rows, lse_dtypes, device)


def _check_mla_rows(q_nope: Tensor, q_pe: Tensor, latent_cache: Tensor, batch: Batch, dtypes: Dtypes) -> None:
    check_rows("q_nope", q_nope, 3, (*dtypes, FLOAT8), batch.device)
    check_rows("q_pe", q_pe, 3, (q_nope.dtype,), batch.device)
    check_cache("latent_cache", latent_cache, 3, cache_dtypes(q_nope), batch.device)
    if q_pe.shape[:2] != q_nope.shape[:2]:
        raise bad_value(
            "q_pe",
            f"{q_pe.shape[0]} tokens x {q_pe.shape[1]} heads",
            f"q_nope's {q_nope.shape[0]} tokens x {q_nope.shape[1]} heads",
        )


def _mla_sizes(
    q_nope: Tensor, q_pe: Tensor, latent_cache: Tensor, rank: int, *, head_size_v: int, rank_from: str
) -> Sizes:
    head_size = rank + q_pe.shape[2]
    if latent_cache.shape[2] != head_size:
        raise bad_value(
            "latent_cache",
            f"rows of {latent_cache.shape[2]}",
            f"{rank} (kv_lora_rank, from {rank_from}) + {q_pe.shape[2]} (q_pe)",
        )
    return Sizes(q_nope.shape[0], q_nope.shape[1], 1, head_size, head_size_v, *latent_cache.shape[:2])


def _check_mla_rest(
    sizes: Sizes,
    q_nope: Tensor,
    latent_cache: Tensor,
    batch: Batch,
    rules: Rules,
    scales: Scales | None,
    out: Tensor | None,
    lse: Tensor | None,
    dtypes: Dtypes,
) -> None:
    _check_outputs(out, lse, sizes, batch.device, dtypes)
    check_rules(rules, sizes.num_tokens, sizes.num_query_heads, batch.device)
    if scales is not None:
        check_scale("q", scales.q, q_nope.dtype, 1, batch.device)
        check_scale("k", scales.k, latent_cache.dtype, 1, batch.device)
        check_scale("v", scales.v, None, 1, batch.device)
        check_scale("out", scales.out, _out_dtype(out, q_nope), 1, batch.device)
