"""The argument groups of the kernels: tensors and their strides, named, in NamedTuples that Triton unpacks.

A field that is None compiles away. No field may be called `values` or `type`: Triton's own tuple has those.
Strides count elements. Integers that may differ from call to call must not be in a tuple that a kernel is launched
with: Triton specialises what is inside of a tuple (on 1 and on multiples of 16), whatever `do_not_specialize` says,
and would compile again. They are plain arguments of the kernels, which make their own tuple of them: `Numbers`.
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


class Pages(NamedTuple):
    """A paged cache [num_blocks, block_size, num_kv_heads, size] with any strides."""

    base: Tensor
    stride_block: int
    stride_slot: int
    stride_head: int  # 0: all heads share the rows
    stride_dim: int


class Weights(NamedTuple):
    """An up-projection [num_query_heads, size, kv_lora_rank]."""

    base: Tensor
    stride_head: int
    stride_row: int
    stride_column: int


class PagedKV(NamedTuple):
    """The paged cache.

    Attention: `k` and `v`. MLA: `k` is the latent part, `rope` the rotary part of the same rows, and `v` is None,
    because the values are the latent part again. Decompressed MLA adds the projections.
    """

    k: Pages
    v: Pages | None = None
    rope: Tensor | None = None  # [num_blocks, block_size, qk_rope_head_dim]; its strides are those of `k`
    w_uk: Weights | None = None  # to qk_nope_head_dim
    w_uv: Weights | None = None  # to v_head_dim


class Requests(NamedTuple):
    cu_seqlens_q: Tensor  # [num_requests + 1] int32
    seq_lens: Tensor  # [num_requests] int32
    block_table: Tensor  # [num_requests, max_blocks] int32, row stride Numbers.table_stride


class ScoreRules(NamedTuple):
    softmax_scale: float
    softcap: float | None
    one_over_softcap: float | None
    alibi_slopes: Tensor | None  # [num_query_heads] float32
    sinks: Tensor | None  # [num_query_heads] float32
    query_bias: Tensor | None  # [num_tokens, Numbers.bias_width] float32, row stride Numbers.bias_stride


class Scale(NamedTuple):
    """Asked by its `base` whether it is there: Triton 3.6 cannot compare a whole group with None everywhere."""

    base: Tensor | None = None  # on the device
    stride_head: int | None = None  # 0: one scale for all heads; 1: one per kv head


class DeviceScales(NamedTuple):
    q: Scale = Scale()
    k: Scale = Scale()
    v: Scale = Scale()
    out: Scale = Scale()


class Outputs(NamedTuple):
    out: Tensor  # [num_tokens, num_query_heads, head_size_v]
    stride_token: int
    stride_head: int
    lse: Tensor  # [num_tokens, num_query_heads] float32
    lse_stride_token: int
    lse_stride_head: int


class Partials(NamedTuple):
    """What the splits of a request leave for the merge: rows of (running maximum, sum, weighted values), float32.

    Row `offsets[request] + split * query_len + token` of the request.
    """

    maximum: Tensor  # [partial_rows, num_query_heads]
    total: Tensor  # [partial_rows, num_query_heads]
    weighted: Tensor  # [partial_rows, num_query_heads, head_size_v]


class WorkLists(NamedTuple):
    """What the plan kernel wrote; see plan.Plan."""

    counts: Tensor
    offsets: Tensor
    prefill_items: Tensor
    decode_items: Tensor
    merge_items: Tensor


class Step(NamedTuple):
    """What a step of attention reads and writes, apart from partial results."""

    queries: Queries
    cache: PagedKV
    requests: Requests
    rules: ScoreRules
    scales: DeviceScales
    outputs: Outputs
    work: WorkLists


class Numbers(NamedTuple):
    """The integers of a step that no kernel is compiled for; in this order arguments of the attention kernels."""

    num_requests: int
    table_stride: int
    sliding_window: int | None
    right_window: int | None
    bias_width: int  # 0 where there is no query bias
    bias_stride: int


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


def scale(tensor: Tensor | None) -> Scale:
    return Scale() if tensor is None else Scale(tensor, int(tensor.numel() > 1))


def pages(cache: Tensor) -> Pages:
    return Pages(cache, *(stride(cache, dim) for dim in range(4)))


def paged_kv(k_cache: Tensor, v_cache: Tensor) -> PagedKV:
    return PagedKV(pages(k_cache), pages(v_cache))


def latent_kv(latent_cache: Tensor, rank: int, w_uk: Tensor | None = None, w_uv: Tensor | None = None) -> PagedKV:
    """A latent cache [num_blocks, block_size, kv_lora_rank + qk_rope_head_dim], whose rows every kv head shares."""
    latent = Pages(latent_cache, stride(latent_cache, 0), stride(latent_cache, 1), 0, stride(latent_cache, 2))
    return PagedKV(latent, rope=latent_cache[:, :, rank:], w_uk=_weights(w_uk), w_uv=_weights(w_uv))


def _weights(tensor: Tensor | None) -> Weights | None:
    return None if tensor is None else Weights(tensor, *(stride(tensor, dim) for dim in range(3)))
