"""Requests with many new tokens: one program per query tile and kv head walks all keys that the tile may see."""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import Numbers
from .attend import attend
from .tiles import finish, key_range, query_tile, store_lse, store_out
from .work_lists import NUM_PREFILL_ITEMS, load_item


@triton.jit(do_not_specialize=Numbers._fields)
def prefill(
    step, table_stride, sliding_window, right_window, bias_width, bias_stride,
    SIZES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    NUM_KV_HEADS: tl.constexpr = SIZES.num_kv_heads
    SUB_TILES: tl.constexpr = (SIZES.tile_tokens * SIZES.group + TILE.rows - 1) // TILE.rows
    numbers = Numbers(table_stride, sliding_window, right_window, bias_width, bias_stride)
    num_items = tl.load(step.work.counts + NUM_PREFILL_ITEMS) * NUM_KV_HEADS * SUB_TILES
    for index in range(tl.program_id(0), num_items, tl.num_programs(0)):
        item = load_item(step.work.prefill_items, index // (NUM_KV_HEADS * SUB_TILES))
        span = item.span
        kv_head = index // SUB_TILES % NUM_KV_HEADS
        sub_tile = index % SUB_TILES
        first_token = item.index * SIZES.tile_tokens
        end_token = tl.minimum(first_token + SIZES.tile_tokens, span.query_len)
        tile = query_tile(span, item.request, kv_head, first_token, end_token, sub_tile, SIZES, TILE)
        start, end = key_range(tile, span, numbers, SIZES.causal)
        state = attend(step, numbers, tile, start, end, SIZES, TILE)
        out, lse = finish(state, step.rules, tile.rows)
        store_out(step.outputs, step.scales, out, tile.rows, kv_head, SIZES)
        store_lse(step.outputs, lse, tile.rows)
