"""The argument groups of the kernels: tensors and their strides, named, in NamedTuples that Triton unpacks.

A field that is None compiles away. No field may be called `values` or `type`: Triton's own tuple has those.
Strides count elements. Integers that change from step to step (lengths,
windows, the table's row stride) are not in here: inside a tuple Triton specialises them (on 1 and on multiples of
16) and would compile again, so they are plain arguments marked `do_not_specialize`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Queries(NamedTuple):
    """Queries [num_tokens, num_query_heads, head_size]; for MLA a second part with the rotary dimensions."""

    main: Tensor
    stride_token: int
    stride_head: int
    rope: Tensor | None
    rope_stride_token: int | None
    rope_stride_head: int | None


class PagedKV(NamedTuple):
    """The paged cache, with any strides.

    Attention: `k_cache` and `v_cache`. MLA: `k_cache` is the latent part, `rope` the rotary part of the same rows, and
    `v_cache` is None, because the values are the latent part again. Decompressed MLA adds the projections.
    """

    k_cache: Tensor  # [num_blocks, block_size, num_kv_heads, head_size]
    key_stride_block: int
    key_stride_slot: int
    key_stride_head: int
    key_stride_dim: int
    v_cache: Tensor | None  # [num_blocks, block_size, num_kv_heads, head_size_v]
    value_stride_block: int | None
    value_stride_slot: int | None
    value_stride_head: int | None
    value_stride_dim: int | None
    rope: Tensor | None  # [num_blocks, block_size, qk_rope_head_dim]; block and slot strides are the keys'
    w_uk: Tensor | None  # [num_query_heads, qk_nope_head_dim, kv_lora_rank]
    w_uk_stride_head: int | None
    w_uk_stride_row: int | None
    w_uk_stride_column: int | None
    w_uv: Tensor | None  # [num_query_heads, v_head_dim, kv_lora_rank]
    w_uv_stride_head: int | None
    w_uv_stride_row: int | None
    w_uv_stride_column: int | None


class Requests(NamedTuple):
    cu_seqlens_q: Tensor  # [num_requests + 1] int32
    seq_lens: Tensor  # [num_requests] int32
    block_table: Tensor  # [num_requests, max_blocks] int32, row stride `table_stride`


class ScoreRules(NamedTuple):
    softmax_scale: float
    softcap: float | None
    two_over_softcap: float | None
    alibi_slopes: Tensor | None  # [num_query_heads] float32
    sinks: Tensor | None  # [num_query_heads] float32
    query_bias: Tensor | None  # [num_tokens, bias_width] float32, row stride `bias_stride`


class DeviceScales(NamedTuple):
    """Scales on the device; a stride of 0 is one scale for all heads, 1 one per kv head."""

    q: Tensor | None
    q_stride: int | None
    k: Tensor | None
    k_stride: int | None
    v: Tensor | None
    v_stride: int | None
    out: Tensor | None
    out_stride: int | None


class Outputs(NamedTuple):
    out: Tensor  # [num_tokens, num_query_heads, head_size_v]
    stride_token: int
    stride_head: int
    lse: Tensor  # [num_tokens, num_query_heads] float32
    lse_stride_token: int
    lse_stride_head: int


class Partials(NamedTuple):
    """What the splits of a request leave for the merge: rows of (running maximum, sum, weighted values), float32.

    Row `partial_offsets[request] + split * query_len + token` of the request.
    """

    maximum: Tensor  # [partial_rows, num_query_heads]
    total: Tensor  # [partial_rows, num_query_heads]
    weighted: Tensor  # [partial_rows, num_query_heads, head_size_v]


class WorkLists(NamedTuple):
    """What the plan kernels wrote; see plan.Plan."""

    counts: Tensor
    offsets: Tensor
    prefill_items: Tensor
    decode_items: Tensor
    merge_items: Tensor


def strides(tensor: Tensor | None, *dims: int) -> tuple[Any, ...]:
    """The strides of `dims`, or as many Nones where there is no tensor.

    A dimension of size 1 may carry any stride; 0 is as good and never overflows.
    """
    if tensor is None:
        return (None,) * len(dims)
    return tuple(tensor.stride(dim) if tensor.shape[dim] > 1 else 0 for dim in dims)
