"""Requests with many new tokens: one program per query tile and kv head walks all keys that the tile may see."""

from __future__ import annotations

import triton
import triton.language as tl

from .attend import attend
from .plan import NUM_PREFILL_ITEMS
from .tiles import finish, key_range, request_span, store_lse, store_out, tile_rows


@triton.jit(do_not_specialize=["table_stride", "sliding_window", "right_window", "bias_width", "bias_stride"])
def prefill(
    queries, cache, requests, rules, scales, outputs, work,
    table_stride, sliding_window, right_window, bias_width, bias_stride,
    CAUSAL: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr, ROPE_SIZE: tl.constexpr, RANK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    SUB_TILES: tl.constexpr = (TILE_TOKENS * GROUP + BLOCK_M - 1) // BLOCK_M
    num_items = tl.load(work.counts + NUM_PREFILL_ITEMS) * NUM_KV_HEADS * SUB_TILES
    for index in range(tl.program_id(0), num_items, tl.num_programs(0)):
        item = index // (NUM_KV_HEADS * SUB_TILES)
        kv_head = index // SUB_TILES % NUM_KV_HEADS
        sub_tile = index % SUB_TILES
        request = tl.load(work.prefill_items + 2 * item)
        first_token = tl.load(work.prefill_items + 2 * item + 1) * TILE_TOKENS
        first_row, query_len, seq_len = request_span(requests, request)
        end_token = tl.minimum(first_token + TILE_TOKENS, query_len)
        context = seq_len - query_len
        tokens, group_heads, row_mask = tile_rows(first_token, end_token, sub_tile, GROUP, BLOCK_M)
        first_position = context + first_token + sub_tile * BLOCK_M // GROUP
        last_position = context + tl.minimum(first_token + (sub_tile * BLOCK_M + BLOCK_M - 1) // GROUP, end_token - 1)
        start, end = key_range(first_position, last_position, seq_len, sliding_window, right_window, CAUSAL)
        rows = first_row + tokens
        heads = kv_head * GROUP + group_heads
        values, maximum, total = attend(
            queries, cache, requests, rules, scales, request, kv_head, rows, heads, context + tokens, row_mask, context,
            first_position, last_position, start, end,
            table_stride, sliding_window, right_window, bias_width, bias_stride,
            CAUSAL, HEAD_SIZE, HEAD_SIZE_V, ROPE_SIZE, RANK, BLOCK_SIZE,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, BLOCK_R, BLOCK_C, KIND,
        )  # fmt: skip
        out, lse = finish(values, maximum, total, rules, heads, row_mask)
        store_out(outputs, scales, out, rows, heads, kv_head, row_mask, HEAD_SIZE_V, BLOCK_V)
        store_lse(outputs, lse, rows, heads, row_mask)
