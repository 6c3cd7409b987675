"""Joining partial results: the splits of a decode request, and two states with their lse."""

from __future__ import annotations

import triton
import triton.language as tl

from .groups import Rows
from .padding import clear_padding
from .tiles import LN_2, LOG2_E, distance_from, finite_maximum, join_sink, log_sum, store_lse, store_out
from .work_lists import NUM_MERGE_ITEMS, load_item


@triton.jit
def join_splits(partials, first_partial, query_len, splits, head, SIZES: tl.constexpr):
    """(values [padded_value], maximum, total) of one row over all its splits, in the order of the keys."""
    BLOCK_V: tl.constexpr = SIZES.padded_value
    dims = tl.arange(0, BLOCK_V)
    maximum = float("-inf")
    total = 0.0
    values = tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, splits, SIZES.splits_step):
        split = first + tl.arange(0, SIZES.splits_step)
        mask = split < splits
        place = (first_partial + split * query_len).to(tl.int64) * SIZES.num_query_heads + head
        # Asked for first, or the assembler lets them wait until the maxima have come.
        pointers = partials.weighted + place[:, None] * SIZES.head_size_v + dims[None, :]
        parts = tl.load(pointers, mask=mask[:, None] & (dims < SIZES.head_size_v)[None, :], other=0.0)
        maxima = tl.load(partials.maximum + place, mask=mask, other=float("-inf"))
        totals = tl.load(partials.total + place, mask=mask, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(maxima, 0))
        stand_in = finite_maximum(new_maximum)
        rescale = tl.exp2(maximum - stand_in)
        weights = tl.exp2(maxima - stand_in)
        total = total * rescale + tl.sum(totals * weights, 0)
        values = values * rescale + tl.sum(parts * weights[:, None], 0)
        maximum = new_maximum
    return values, maximum, total


@triton.jit(do_not_specialize=["num_tokens"])
def merge_splits(rules, scales, outputs, partials, work, num_tokens, SIZES: tl.constexpr):
    """The rows whose requests were split, and those of no request: a launch of their own would cost 3 us.

    A program's rows are neighbours: most are heads of one token, whose record it then finds in its cache.
    """
    NUM_QUERY_HEADS: tl.constexpr = SIZES.num_query_heads
    # Asked for together with the counts. What lies there is used if the list has it: if a program has one row.
    item = load_item(work.merge_items, tl.minimum(tl.program_id(0) // NUM_QUERY_HEADS, SIZES.partial_rows - 1))
    num_rows = tl.load(work.counts + NUM_MERGE_ITEMS) * NUM_QUERY_HEADS
    share = tl.cdiv(num_rows, tl.num_programs(0))
    first_row = tl.program_id(0) * share
    if (share > 1) & (first_row < num_rows):
        item = load_item(work.merge_items, first_row // NUM_QUERY_HEADS)
    one = tl.arange(0, 1)
    for row in range(first_row, tl.minimum(first_row + share, num_rows)):
        head = row % NUM_QUERY_HEADS
        span, token, splits = item.span, item.index, item.num_splits
        first_partial = item.first_partial + token
        values, maximum, total = join_splits(partials, first_partial, span.query_len, splits, head, SIZES)
        if rules.sinks is not None:
            rescale, maximum, total = join_sink(maximum, total, tl.load(rules.sinks + head))
            values = values * rescale
        out = values / tl.where(total > 0.0, total, 1.0)
        rows = Rows(tokens=span.first_row + token + one, heads=head + one, mask=one == 0)
        store_out(outputs, scales, out[None, :], rows, head // SIZES.group, SIZES)
        store_lse(outputs, log_sum(maximum * LN_2, total) + tl.zeros([1], tl.float32), rows)
        item = load_item(work.merge_items, tl.minimum(row + 1, num_rows - 1) // NUM_QUERY_HEADS)
    clear_padding(work.counts, outputs, num_tokens, SIZES)


@triton.jit(do_not_specialize=["num_rows"])
def merge_pair(a, b, outputs, num_rows, SIZES: tl.constexpr):
    """Rows (token, head) of two states; `a` and `b` are Outputs groups that are read."""
    BLOCK_T: tl.constexpr = SIZES.rows_step
    dims = tl.arange(0, SIZES.padded_value)
    for start in range(tl.program_id(0) * BLOCK_T, num_rows, tl.num_programs(0) * BLOCK_T):
        item = start + tl.arange(0, BLOCK_T)
        mask = item < num_rows
        tokens = (item // SIZES.num_query_heads).to(tl.int64)
        heads = (item % SIZES.num_query_heads).to(tl.int64)
        lse_a = tl.load(a.lse + tokens * a.lse_stride_token + heads * a.lse_stride_head, mask=mask, other=0.0)
        lse_b = tl.load(b.lse + tokens * b.lse_stride_token + heads * b.lse_stride_head, mask=mask, other=0.0)
        maximum = tl.maximum(lse_a, lse_b)
        weight_a = tl.exp2(distance_from(lse_a, maximum) * LOG2_E)
        weight_b = tl.exp2(distance_from(lse_b, maximum) * LOG2_E)
        total = weight_a + weight_b
        # A part without weight is not even read: its out may be NaN.
        inside = (dims < SIZES.head_size_v)[None, :]
        place_a = (tokens * a.stride_token + heads * a.stride_head)[:, None] + dims[None, :]
        place_b = (tokens * b.stride_token + heads * b.stride_head)[:, None] + dims[None, :]
        out_a = tl.load(a.out + place_a, mask=(mask & (weight_a > 0.0))[:, None] & inside, other=0.0).to(tl.float32)
        out_b = tl.load(b.out + place_b, mask=(mask & (weight_b > 0.0))[:, None] & inside, other=0.0).to(tl.float32)
        divisor = tl.where(total > 0.0, total, 1.0)
        out = (out_a * weight_a[:, None] + out_b * weight_b[:, None]) / divisor[:, None]
        place = (tokens * outputs.stride_token + heads * outputs.stride_head)[:, None] + dims[None, :]
        tl.store(outputs.out + place, out.to(outputs.out.dtype.element_ty), mask=mask[:, None] & inside)
        store_lse(outputs, log_sum(maximum, total), Rows(tokens=tokens, heads=heads, mask=mask))
