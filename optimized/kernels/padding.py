"""Rows of the buffers that no request of the step fills."""

from __future__ import annotations

import triton
import triton.language as tl

from .groups import Rows
from .tiles import store_lse
from .work_lists import NUM_ROWS


@triton.jit
def clear_padding(counts, outputs, num_tokens, SIZES: tl.constexpr):
    """Rows that belong to no request: out 0, lse -inf, also beside a sink."""
    BLOCK_T: tl.constexpr = SIZES.rows_step
    BLOCK_V: tl.constexpr = SIZES.padded_value
    first_row = tl.load(counts + NUM_ROWS)
    dims = tl.arange(0, BLOCK_V)
    zeros = tl.zeros([BLOCK_T, BLOCK_V], tl.float32).to(outputs.out.dtype.element_ty)
    empty = tl.full([BLOCK_T], float("-inf"), tl.float32)
    num_items = tl.maximum(num_tokens - first_row, 0) * SIZES.num_query_heads
    for start in range(tl.program_id(0) * BLOCK_T, num_items, tl.num_programs(0) * BLOCK_T):
        item = start + tl.arange(0, BLOCK_T)
        mask = item < num_items
        tokens = (first_row + item // SIZES.num_query_heads).to(tl.int64)
        heads = (item % SIZES.num_query_heads).to(tl.int64)
        place = tokens * outputs.stride_token + heads * outputs.stride_head
        pointers = outputs.out + place[:, None] + dims[None, :]
        tl.store(pointers, zeros, mask=mask[:, None] & (dims < SIZES.head_size_v)[None, :])
        store_lse(outputs, empty, Rows(tokens=tokens, heads=heads, mask=mask))
