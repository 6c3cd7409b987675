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
    """What attention asks of the requests themselves; the rest is in the plan's lists."""

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


NO_SCALE = Scale()


class DeviceScales(NamedTuple):
    q: Scale = NO_SCALE
    k: Scale = NO_SCALE
    v: Scale = NO_SCALE
    out: Scale = NO_SCALE


class Outputs(NamedTuple):
    out: Tensor  # [num_tokens, num_query_heads, head_size_v]
    stride_token: int
    stride_head: int
    lse: Tensor  # [num_tokens, num_query_heads] float32
    lse_stride_token: int
    lse_stride_head: int


class Partials(NamedTuple):
    """What the splits of a request leave for the merge: rows of (running maximum, sum, weighted values), float32.

    Those of a request's token are rows Item.first_partial + split * query_len + token.
    """

    maximum: Tensor  # [partial_rows, num_query_heads]
    total: Tensor  # [partial_rows, num_query_heads]
    weighted: Tensor  # [partial_rows, num_query_heads, head_size_v]


class WorkLists(NamedTuple):
    """What the plan kernel wrote; see plan.Plan."""

    counts: Tensor
    prefill_items: Tensor
    decode_items: Tensor
    merge_items: Tensor


class Step(NamedTuple):
    """What a step of attention reads and writes, apart from partial results; which rows and keys, `work` says.

    Groups only: with a tensor among them Triton 3.6 takes the integers inside of the others for None.
    """

    queries: Queries
    cache: PagedKV
    requests: Requests
    rules: ScoreRules
    scales: DeviceScales
    outputs: Outputs
    work: WorkLists


class Numbers(NamedTuple):
    """The integers of a step that no kernel is compiled for; in this order arguments of the attention kernels."""

    table_stride: int
    sliding_window: int | None
    right_window: int | None
    bias_width: int  # 0 where there is no query bias
    bias_stride: int


def strides(tensor: Tensor) -> tuple[int, ...]:
    """A dimension of size 1 may carry any stride, as large as it likes; here it gets that of a packed tensor.

    Triton compiles anew when a stride is a multiple of 16 and was not before. So a step of one token must not bring
    another kind of stride than a step of two.
    """
    found, shape = tensor.stride(), tensor.shape
    if 1 not in shape:
        return found
    packed, result = 1, []
    for size, own in zip(reversed(shape), reversed(found), strict=True):
        result.append(own if size > 1 else packed)
        packed = size * result[-1]
    return tuple(reversed(result))


def queries(main: Tensor, rope: Tensor | None = None) -> Queries:
    token, head, _ = strides(main)
    if rope is None:
        return Queries(main, token, head, None, None, None)
    return Queries(main, token, head, rope, *strides(rope)[:2])


def outputs(out: Tensor, lse: Tensor) -> Outputs:
    (token, head, _), (lse_token, lse_head) = strides(out), strides(lse)
    return Outputs(out, token, head, lse, lse_token, lse_head)


def scale(tensor: Tensor | None) -> Scale:
    return NO_SCALE if tensor is None else Scale(tensor, int(tensor.numel() > 1))


def pages(cache: Tensor) -> Pages:
    return Pages(cache, *strides(cache))


def paged_kv(k_cache: Tensor, v_cache: Tensor) -> PagedKV:
    return PagedKV(pages(k_cache), pages(v_cache))


def latent_kv(latent_cache: Tensor, rank: int, w_uk: Tensor | None = None, w_uv: Tensor | None = None) -> PagedKV:
    """A latent cache [num_blocks, block_size, kv_lora_rank + qk_rope_head_dim], whose rows every kv head shares."""
    block, slot, dim = strides(latent_cache)
    latent = Pages(latent_cache, block, slot, 0, dim)
    return PagedKV(latent, rope=latent_cache[:, :, rank:], w_uk=_weights(w_uk), w_uv=_weights(w_uv))


def _weights(tensor: Tensor | None) -> Weights | None:
    return None if tensor is None else Weights(tensor, *strides(tensor))
