"""The argument groups of the kernels: tensors and their strides, named, in NamedTuples that Triton unpacks.

A field that is None compiles away. No field may be called `values` or `type`: Triton's own tuple has those.
Strides count elements. Integers that change from step to step (lengths,
windows, the table's row stride) are not in here: inside a tuple Triton specialises them (on 1 and on multiples of
16) and would compile again, so they are plain arguments marked `do_not_specialize`.
"""

from __future__ import annotations

from typing import NamedTuple

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
    v_cache: Tensor | None = None  # [num_blocks, block_size, num_kv_heads, head_size_v]
    value_stride_block: int | None = None
    value_stride_slot: int | None = None
    value_stride_head: int | None = None
    value_stride_dim: int | None = None
    rope: Tensor | None = None  # [num_blocks, block_size, qk_rope_head_dim]; block and slot strides are the keys'
    w_uk: Tensor | None = None  # [num_query_heads, qk_nope_head_dim, kv_lora_rank]
    w_uk_stride_head: int | None = None
    w_uk_stride_row: int | None = None
    w_uk_stride_column: int | None = None
    w_uv: Tensor | None = None  # [num_query_heads, v_head_dim, kv_lora_rank]
    w_uv_stride_head: int | None = None
    w_uv_stride_row: int | None = None
    w_uv_stride_column: int | None = None


class Requests(NamedTuple):
    cu_seqlens_q: Tensor  # [num_requests + 1] int32
    seq_lens: Tensor  # [num_requests] int32
    block_table: Tensor  # [num_requests, max_blocks] int32, row stride `table_stride`


class ScoreRules(NamedTuple):
    softmax_scale: float
    softcap: float | None
    one_over_softcap: float | None
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


def stride(tensor: Tensor, dim: int) -> int:
    """A dimension of size 1 may carry any stride, as large as it likes; here it gets that of a packed tensor.

    Triton compiles anew when a stride is a multiple of 16 and was not before. So a step of one token must not bring
    another kind of stride than a step of two.
    """
    if tensor.shape[dim] > 1:
        return tensor.stride(dim)
    return 1 if dim == tensor.dim() - 1 else tensor.shape[dim + 1] * stride(tensor, dim + 1)


def _stride(tensor: Tensor | None, dim: int) -> int | None:
    return None if tensor is None else stride(tensor, dim)


def queries(main: Tensor, rope: Tensor | None = None) -> Queries:
    return Queries(main, stride(main, 0), stride(main, 1), rope, _stride(rope, 0), _stride(rope, 1))


def outputs(out: Tensor, lse: Tensor) -> Outputs:
    return Outputs(out, stride(out, 0), stride(out, 1), lse, stride(lse, 0), stride(lse, 1))


def paged_kv(k_cache: Tensor, v_cache: Tensor) -> PagedKV:
    return PagedKV(
        k_cache=k_cache,
        key_stride_block=stride(k_cache, 0),
        key_stride_slot=stride(k_cache, 1),
        key_stride_head=stride(k_cache, 2),
        key_stride_dim=stride(k_cache, 3),
        v_cache=v_cache,
        value_stride_block=stride(v_cache, 0),
        value_stride_slot=stride(v_cache, 1),
        value_stride_head=stride(v_cache, 2),
        value_stride_dim=stride(v_cache, 3),
    )


def latent_kv(latent_cache: Tensor, rank: int, w_uk: Tensor | None = None, w_uv: Tensor | None = None) -> PagedKV:
    """A latent cache: rows that every kv head shares, hence a head stride of 0."""
    return PagedKV(
        k_cache=latent_cache,
        key_stride_block=stride(latent_cache, 0),
        key_stride_slot=stride(latent_cache, 1),
        key_stride_head=0,
        key_stride_dim=stride(latent_cache, 2),
        rope=latent_cache[:, :, rank:],
        w_uk=w_uk,
        w_uk_stride_head=_stride(w_uk, 0),
        w_uk_stride_row=_stride(w_uk, 1),
        w_uk_stride_column=_stride(w_uk, 2),
        w_uv=w_uv,
        w_uv_stride_head=_stride(w_uv, 0),
        w_uv_stride_row=_stride(w_uv, 1),
        w_uv_stride_column=_stride(w_uv, 2),
    )
