"""Requests with few new tokens: their keys are split over programs; `merge.py` joins what the splits leave.

A request with a single split is finished here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attend import attend
from .plan import MOST_DECODE_TOKENS, NUM_DECODE_ITEMS, SPLIT_KEYS, first_partial_row, num_splits
from .tiles import finish, key_range, request_span, store_lse, store_out, tile_rows


@triton.jit
def store_partials(
    partials, first_partial, tokens, heads, mask, values, maximum, total,
    NUM_QUERY_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = (first_partial + tokens).to(tl.int64) * NUM_QUERY_HEADS + heads
    tl.store(partials.maximum + place, maximum, mask=mask)
    tl.store(partials.total + place, total, mask=mask)
    dims = tl.arange(0, BLOCK)
    pointers = partials.weighted + place[:, None] * SIZE + dims[None, :]
    tl.store(pointers, values, mask=mask[:, None] & (dims < SIZE)[None, :])


@triton.jit
def walk_splits(
    queries, cache, requests, rules, scales, outputs, partials, work,
    num_requests, table_stride, sliding_window, right_window, bias_width, bias_stride,
    CAUSAL: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr, ROPE_SIZE: tl.constexpr, RANK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A program's share of the splits, in tiles of BLOCK_M rows."""
    # As many tiles as the longest request needs, so that batches of single tokens leave no program without work.
    num_sub_tiles = tl.cdiv(tl.load(work.counts + MOST_DECODE_TOKENS) * GROUP, BLOCK_M)
    num_items = tl.load(work.counts + NUM_DECODE_ITEMS) * NUM_KV_HEADS * num_sub_tiles
    split_keys = tl.load(work.counts + SPLIT_KEYS)
    for index in range(tl.program_id(0), num_items, tl.num_programs(0)):
        item = index // (NUM_KV_HEADS * num_sub_tiles)
        kv_head = index // num_sub_tiles % NUM_KV_HEADS
        sub_tile = index % num_sub_tiles
        request = tl.load(work.decode_items + 2 * item)
        split = tl.load(work.decode_items + 2 * item + 1)
        first_row, query_len, seq_len = request_span(requests, request)
        if sub_tile * BLOCK_M < query_len * GROUP:
            context = seq_len - query_len
            tokens, group_heads, row_mask = tile_rows(0, query_len, sub_tile, GROUP, BLOCK_M)
            first_position = context + sub_tile * BLOCK_M // GROUP
            last_position = context + tl.minimum((sub_tile * BLOCK_M + BLOCK_M - 1) // GROUP, query_len - 1)
            start, end = key_range(first_position, last_position, seq_len, sliding_window, right_window, CAUSAL)
            start = tl.maximum(start, split * split_keys)
            # In this order nothing overflows: what is left of the keys, cut to one split.
            end = split * split_keys + tl.minimum(end - split * split_keys, split_keys)
            rows = first_row + tokens
            heads = kv_head * GROUP + group_heads
            values, maximum, total = attend(
                queries, cache, requests, rules, scales, request, kv_head, rows, heads, context + tokens, row_mask,
                context, first_position, last_position, start, end,
                table_stride, sliding_window, right_window, bias_width, bias_stride,
                CAUSAL, HEAD_SIZE, HEAD_SIZE_V, ROPE_SIZE, RANK, BLOCK_SIZE,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, BLOCK_R, BLOCK_C, KIND,
            )  # fmt: skip
            if num_splits(seq_len, split_keys) == 1:
                out, lse = finish(values, maximum, total, rules, heads, row_mask)
                store_out(outputs, scales, out, rows, heads, kv_head, row_mask, HEAD_SIZE_V, BLOCK_V)
                store_lse(outputs, lse, rows, heads, row_mask)
            else:
                first_partial = first_partial_row(work.offsets, request, num_requests) + split * query_len
                store_partials(
                    partials, first_partial, tokens, heads, row_mask, values, maximum, total,
                    NUM_KV_HEADS * GROUP, HEAD_SIZE_V, BLOCK_V,
                )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_requests", "table_stride", "sliding_window", "right_window", "bias_width", "bias_stride"]
)
def decode(
    queries, cache, requests, rules, scales, outputs, partials, work,
    num_requests, table_stride, sliding_window, right_window, bias_width, bias_stride,
    CAUSAL: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr, ROPE_SIZE: tl.constexpr, RANK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDE_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """All splits; in tiles of WIDE_M rows, if it is not 0, where a request has more than BLOCK_M of them."""
    narrow = tl.load(work.counts + MOST_DECODE_TOKENS) * GROUP <= BLOCK_M
    if narrow | (WIDE_M == 0):
        walk_splits(
            queries, cache, requests, rules, scales, outputs, partials, work,
            num_requests, table_stride, sliding_window, right_window, bias_width, bias_stride,
            CAUSAL, NUM_KV_HEADS, GROUP, HEAD_SIZE, HEAD_SIZE_V, ROPE_SIZE, RANK, BLOCK_SIZE,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, BLOCK_R, BLOCK_C, KIND,
        )  # fmt: skip
    if WIDE_M > 0:  # noqa: SIM102 - the compiler decides this one, and leaves out what is in it
        if not narrow:
            walk_splits(
                queries, cache, requests, rules, scales, outputs, partials, work,
                num_requests, table_stride, sliding_window, right_window, bias_width, bias_stride,
                CAUSAL, NUM_KV_HEADS, GROUP, HEAD_SIZE, HEAD_SIZE_V, ROPE_SIZE, RANK, BLOCK_SIZE,
                WIDE_M, BLOCK_N, BLOCK_D, BLOCK_V, BLOCK_R, BLOCK_C, KIND,
            )  # fmt: skip
