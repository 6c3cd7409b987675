"""Writing new keys and values into the pages: a copy by slot, with the cast to the cache's format."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import saturate


@triton.jit
def write_row(
    source, source_stride_token, source_stride_head, cache, stride_block, stride_slot, stride_head, stride_dim,
    scale, scale_stride, token, block, slot,
    NUM_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, BLOCK)
    for first in tl.static_range(0, NUM_HEADS, BLOCK_H):
        heads = (first + tl.arange(0, BLOCK_H)).to(tl.int64)
        mask = (heads < NUM_HEADS)[:, None] & (dims < SIZE)[None, :]
        place = tl.cast(token, tl.int64) * source_stride_token + heads[:, None] * source_stride_head + dims[None, :]
        row = tl.load(source + place, mask=mask)
        if cache.dtype.element_ty == tl.float8e4nv:
            row = row.to(tl.float32)
            if scale is not None:
                divisor = tl.load(scale + heads * scale_stride, mask=heads < NUM_HEADS, other=1.0)
                row = tl.div_rn(row, tl.broadcast_to(divisor[:, None], row.shape))
            row = saturate(row)
        target = block * stride_block + slot * stride_slot + heads * stride_head
        pointers = cache + target[:, None] + (dims.to(tl.int64) * stride_dim)[None, :]
        tl.store(pointers, row.to(cache.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def kv_update(
    keys, values, cache, scales, slot_mapping, num_tokens,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_SIZE_V: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Row i of `keys` and `values` (Queries groups) goes to slot_mapping[i]; a negative slot is skipped."""
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        place = tl.load(slot_mapping + token)
        if place >= 0:
            block = place // BLOCK_SIZE
            slot = place % BLOCK_SIZE
            write_row(
                keys.main, keys.stride_token, keys.stride_head,
                cache.k_cache, cache.key_stride_block, cache.key_stride_slot,
                cache.key_stride_head, cache.key_stride_dim,
                scales.k, scales.k_stride, token, block, slot, NUM_HEADS, HEAD_SIZE, BLOCK_H, BLOCK_D,
            )  # fmt: skip
            write_row(
                values.main, values.stride_token, values.stride_head,
                cache.v_cache, cache.value_stride_block, cache.value_stride_slot,
                cache.value_stride_head, cache.value_stride_dim,
                scales.v, scales.v_stride, token, block, slot, NUM_HEADS, HEAD_SIZE_V, BLOCK_H, BLOCK_V,
            )  # fmt: skip
