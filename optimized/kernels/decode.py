"""Requests with few new tokens: their keys are split over programs; `merge.py` joins what the splits leave.

A request with a single split is finished here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import Numbers
from .attend import attend
from .tiles import finish, key_range, query_tile, store_lse, store_out
from .work_lists import MOST_DECODE_TOKENS, NUM_DECODE_ITEMS, ONE_TILE, load_item


@triton.jit
def store_partials(partials, first_partial, tile, state, SIZES: tl.constexpr):
    place = (first_partial + tile.tokens).to(tl.int64) * (SIZES.num_kv_heads * SIZES.group) + tile.rows.heads
    mask = tile.rows.mask
    tl.store(partials.maximum + place, state.maximum, mask=mask)
    tl.store(partials.total + place, state.total, mask=mask)
    dims = tl.arange(0, SIZES.padded_value)
    pointers = partials.weighted + place[:, None] * SIZES.head_size_v + dims[None, :]
    tl.store(pointers, state.weighted, mask=mask[:, None] & (dims < SIZES.head_size_v)[None, :])


@triton.jit
def split_range(start, end, split, split_keys):
    """What the keys [start, end) and one split have in common."""
    start = tl.maximum(start, split * split_keys)
    # In this order nothing overflows: what is left of the keys, cut to one split.
    end = split * split_keys + tl.minimum(end - split * split_keys, split_keys)
    return start, end


@triton.jit
def walk_splits(step, partials, numbers, item, num_sub_tiles, SIZES: tl.constexpr, TILE: tl.constexpr):
    """A program's share of the splits, each in `num_sub_tiles` tiles of rows. item: its first, if that is one tile."""
    NUM_KV_HEADS: tl.constexpr = SIZES.num_kv_heads
    counts = step.work.counts
    items = step.work.decode_items
    num_items = tl.load(counts + NUM_DECODE_ITEMS) * NUM_KV_HEADS * num_sub_tiles
    if num_sub_tiles > 1:  # noqa: SIM102 - the compiler decides this one where it can
        if tl.program_id(0) < num_items:
            item = load_item(items, tl.program_id(0) // (NUM_KV_HEADS * num_sub_tiles))
    for index in range(tl.program_id(0), num_items, tl.num_programs(0)):
        span = item.span
        kv_head = index // num_sub_tiles % NUM_KV_HEADS
        sub_tile = index % num_sub_tiles
        if sub_tile * TILE.rows < span.query_len * SIZES.group:
            tile = query_tile(span, item.request, kv_head, 0, span.query_len, sub_tile, SIZES, TILE)
            start, end = key_range(tile, span, numbers, SIZES.causal)
            start, end = split_range(start, end, item.index, item.split_keys)
            state = attend(step, numbers, tile, start, end, SIZES, TILE)
            if item.num_splits == 1:
                out, lse = finish(state, step.rules, tile.rows)
                store_out(step.outputs, step.scales, out, tile.rows, kv_head, SIZES)
                store_lse(step.outputs, lse, tile.rows)
            else:
                first_partial = item.first_partial + item.index * span.query_len
                store_partials(partials, first_partial, tile, state, SIZES)
        following = tl.minimum(index + tl.num_programs(0), num_items - 1)
        item = load_item(items, following // (NUM_KV_HEADS * num_sub_tiles))


@triton.jit(do_not_specialize=Numbers._fields)
def decode(
    step, partials, table_stride, sliding_window, right_window, bias_width, bias_stride,
    SIZES: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All splits; in tiles of WIDE, if there is one, where a request has more rows than a TILE or ONE_TILE is set."""
    numbers = Numbers(table_stride, sliding_window, right_window, bias_width, bias_stride)
    # Asked for together with the counts. What lies there is used if the list has it, and if a split is one tile.
    place = tl.minimum(tl.program_id(0) // SIZES.num_kv_heads, SIZES.partial_rows - 1)
    item = load_item(step.work.decode_items, place)
    # As many tiles as the longest request needs, so that batches of single tokens leave no program without work.
    most_rows = tl.load(step.work.counts + MOST_DECODE_TOKENS) * SIZES.group
    if WIDE is None:
        walk_splits(step, partials, numbers, item, tl.cdiv(most_rows, TILE.rows), SIZES, TILE)
    else:
        if (most_rows <= TILE.rows) & (tl.load(step.work.counts + ONE_TILE) == 0):
            # A constant: a division by a number out of memory would stand before the first load of keys.
            walk_splits(step, partials, numbers, item, 1, SIZES, TILE)
        else:
            walk_splits(step, partials, numbers, item, tl.cdiv(most_rows, WIDE.rows), SIZES, WIDE)
