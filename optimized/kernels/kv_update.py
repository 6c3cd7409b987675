"""Writing new keys and values into the pages: a copy by slot, with the cast to the cache's format."""

from __future__ import annotations

import triton
import triton.language as tl

from .groups import Rows
from .tiles import load_rows, saturate


@triton.jit
def write_rows(found, pages, scale, rows, place, SIZES: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """`found` [rows, PADDED], heads of several tokens, into the slots `place` of `pages`; none if that is negative."""
    mask = rows.mask & (place >= 0)
    if pages.base.dtype.element_ty == tl.float8e4nv:
        found = found.to(tl.float32)
        if scale.base is not None:
            divisor = tl.load(scale.base + rows.heads * scale.stride_head, mask=rows.mask, other=1.0)
            found = tl.div_rn(found, tl.broadcast_to(divisor[:, None], found.shape))
        found = saturate(found)
    block = place // SIZES.block_size
    slot = place % SIZES.block_size
    target = block * pages.stride_block + slot * pages.stride_slot + rows.heads.to(tl.int64) * pages.stride_head
    dims = tl.arange(0, PADDED)
    pointers = pages.base + target[:, None] + (dims.to(tl.int64) * pages.stride_dim)[None, :]
    tl.store(pointers, found.to(pages.base.dtype.element_ty), mask=mask[:, None] & (dims < SIZE)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def kv_update(keys, values, cache, scales, slot_mapping, num_tokens, SIZES: tl.constexpr):
    """Row i of `keys` and `values` (Queries groups) goes to slot_mapping[i]; a negative slot is skipped.

    Slots, keys and values are asked for at once, those of skipped rows too: only what is written waits for its slot.
    """
    NUM_HEADS: tl.constexpr = SIZES.num_kv_heads
    HEADS: tl.constexpr = SIZES.heads_step
    TOKENS: tl.constexpr = SIZES.tokens_step
    flat = tl.arange(0, TOKENS * HEADS)
    for first in range(tl.program_id(0) * TOKENS, num_tokens, tl.num_programs(0) * TOKENS):
        tokens = first + flat // HEADS
        exists = tokens < num_tokens
        place = tl.load(slot_mapping + tokens, mask=exists, other=-1)
        for first_head in tl.static_range(0, NUM_HEADS, HEADS):
            heads = first_head + flat % HEADS
            rows = Rows(tokens=tokens, heads=heads, mask=exists & (heads < NUM_HEADS))
            key = load_rows(keys.main, keys.stride_token, keys.stride_head, rows, SIZES.head_size, SIZES.padded_head)
            value = load_rows(
                values.main, values.stride_token, values.stride_head, rows, SIZES.head_size_v, SIZES.padded_value
            )
            write_rows(key, cache.k, scales.k, rows, place, SIZES, SIZES.head_size, SIZES.padded_head)
            write_rows(value, cache.v, scales.v, rows, place, SIZES, SIZES.head_size_v, SIZES.padded_value)
