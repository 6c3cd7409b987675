"""Writing new keys and values into the pages: a copy by slot, with the cast to the cache's format."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import saturate


@triton.jit
def write_row(source, pages, scale, token, block, slot, SIZES: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """One token's heads of `source` (Queries) into one slot of `pages`."""
    NUM_HEADS: tl.constexpr = SIZES.num_kv_heads
    HEADS_STEP: tl.constexpr = SIZES.heads_step
    dims = tl.arange(0, PADDED)
    for first in tl.static_range(0, NUM_HEADS, HEADS_STEP):
        heads = (first + tl.arange(0, HEADS_STEP)).to(tl.int64)
        mask = (heads < NUM_HEADS)[:, None] & (dims < SIZE)[None, :]
        place = tl.cast(token, tl.int64) * source.stride_token + heads[:, None] * source.stride_head + dims[None, :]
        row = tl.load(source.main + place, mask=mask)
        if pages.base.dtype.element_ty == tl.float8e4nv:
            row = row.to(tl.float32)
            if scale.base is not None:
                divisor = tl.load(scale.base + heads * scale.stride_head, mask=heads < NUM_HEADS, other=1.0)
                row = tl.div_rn(row, tl.broadcast_to(divisor[:, None], row.shape))
            row = saturate(row)
        target = block * pages.stride_block + slot * pages.stride_slot + heads * pages.stride_head
        pointers = pages.base + target[:, None] + (dims.to(tl.int64) * pages.stride_dim)[None, :]
        tl.store(pointers, row.to(pages.base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def kv_update(keys, values, cache, scales, slot_mapping, num_tokens, SIZES: tl.constexpr):
    """Row i of `keys` and `values` (Queries groups) goes to slot_mapping[i]; a negative slot is skipped."""
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        place = tl.load(slot_mapping + token)
        if place >= 0:
            block = place // SIZES.block_size
            slot = place % SIZES.block_size
            write_row(keys, cache.k, scales.k, token, block, slot, SIZES, SIZES.head_size, SIZES.padded_head)
            write_row(values, cache.v, scales.v, token, block, slot, SIZES, SIZES.head_size_v, SIZES.padded_value)
