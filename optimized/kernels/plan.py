"""The plan kernel: from the lengths on the device to the work lists that persistent programs walk.

Requests with few new tokens (decode, speculative verification) are split along their keys and merged; the others
are tiled along their queries. How long a split is, is decided here from the whole batch: so that programs have as
much to do as each other, and that the partial results always fit into `partial_rows` rows and no scratch grows with
requests x length.

No program waits for another: each looks at all requests, sums up what those before its own bring, and lists what its
own bring. One launch, in which the lengths are the only thing that is waited for.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .groups import Item, Span
from .work_lists import (
    MOST_DECODE_TOKENS,
    NUM_DECODE_ITEMS,
    NUM_MERGE_ITEMS,
    NUM_PARTIAL_ROWS,
    NUM_PREFILL_ITEMS,
    NUM_ROWS,
    ONE_TILE,
    list_items,
)

# A split this long is never cut: capacities stay below it. It is the last level; so many doublings make it.
WHOLE = tl.constexpr(1 << 30)
WHOLE_DOUBLINGS = tl.constexpr(30)
LEVELS = tl.constexpr(16)
MOST_DOUBLINGS = tl.constexpr(23)  # of 128 keys: more than WHOLE is


class Lengths(NamedTuple):
    """Of some requests; 0 where there is none."""

    first_row: tl.tensor  # behind the last request: the number of rows
    query: tl.tensor
    decode_query: tl.tensor  # 0 for a request that is not in the decode list
    keys: tl.tensor


class Work(NamedTuple):
    """How much some requests bring to each list."""

    prefill: tl.tensor  # query tiles
    decode: tl.tensor  # splits
    merge: tl.tensor  # rows of split requests
    partial: tl.tensor  # splits x tokens of split requests


@triton.jit
def load_lengths(cu_seqlens_q, seq_lens, requests, num_requests, LIMITS: tl.constexpr):
    mask = requests < num_requests
    start = tl.load(cu_seqlens_q + requests, mask=requests <= num_requests, other=0)
    end = tl.load(cu_seqlens_q + requests + 1, mask=mask, other=0)
    keys = tl.load(seq_lens + requests, mask=mask, other=0)
    query = tl.where(mask, end - start, 0)
    decode_query = tl.where((query > 0) & (query <= LIMITS.decode_tokens), query, 0)
    return Lengths(first_row=start, query=query, decode_query=decode_query, keys=tl.maximum(keys, 0))


@triton.jit
def num_splits_of(keys, doublings, LIMITS: tl.constexpr):
    """How many splits of split_base * 2^doublings keys: one at least, for rows without keys must be written too."""
    shortest = tl.cdiv(keys, LIMITS.split_base)
    return tl.maximum((shortest + (1 << doublings) - 1) >> doublings, 1)


@triton.jit
def sum_both(high, low):
    """Two sums below 2^31 for one reduction, which the warps wait for each other in."""
    both = tl.sum((high.to(tl.int64) << 32) + low, 0)
    return both >> 32, both & 0xFFFFFFFF


@triton.jit
def choose_split(
    cu_seqlens_q, seq_lens, num_requests, request_programs, programs, LIMITS: tl.constexpr, BLOCK: tl.constexpr
):
    """(doublings, most tokens of a decode request): the split, split_base * 2^doublings keys, that is done first.

    Only lengths whose partial results fit into `partial_rows` rows are taken. Each of `programs` programs takes splits
    in turn; a split costs its keys, and `split_cost` for what it begins and ends with; a request takes
    `request_programs` programs at a time. Of equally good lengths the shortest.
    """
    levels = tl.arange(0, LEVELS)
    doublings = tl.where(levels == LEVELS - 1, WHOLE_DOUBLINGS, levels)
    rows = tl.zeros([LEVELS], tl.int64)
    items = tl.zeros([LEVELS], tl.int64)
    all_keys = tl.cast(0, tl.int64)
    longest = 1
    most_tokens = 0
    for start in range(0, num_requests, BLOCK):
        requests = start + tl.arange(0, BLOCK)
        lengths = load_lengths(cu_seqlens_q, seq_lens, requests, num_requests, LIMITS)
        tokens = lengths.decode_query
        keys = tl.where(tokens > 0, lengths.keys, 0)
        splits = num_splits_of(keys[:, None], doublings[None, :], LIMITS)
        # Bounded, so that no sum wraps around: one request with more splits is too many rows already.
        splits = tl.where(tokens[:, None] > 0, tl.minimum(splits, LIMITS.partial_rows + 1), 0)
        needed = tl.where(splits > 1, splits * tokens[:, None], 0)
        more_rows, more_items = sum_both(needed, splits)
        rows += more_rows
        items += more_items
        all_keys += tl.sum(keys.to(tl.int64), 0)
        longest = tl.maximum(longest, tl.max(keys, 0))
        most_tokens = tl.maximum(most_tokens, tl.max(tokens, 0))
    length = tl.minimum(tl.where(levels == LEVELS - 1, WHOLE, LIMITS.split_base << levels), longest)
    most_work = tl.maximum(all_keys, num_requests.to(tl.int64) * (LIMITS.partial_rows + 1)) * request_programs
    # Both sides of most batches' divisions fit into int32, whose division takes a fraction of the time.
    if tl.maximum(most_work, programs * tl.cast(longest, tl.int64)) < 1 << 30:
        rounds = tl.cdiv(all_keys.to(tl.int32) * request_programs, programs * length).to(tl.int64)
        begun = tl.cdiv(items.to(tl.int32) * request_programs, programs).to(tl.int64)
    else:
        rounds = tl.cdiv(all_keys * request_programs, programs * length.to(tl.int64))
        begun = tl.cdiv(items * request_programs, programs)
    cost = rounds * length + LIMITS.split_cost * begun
    cost = tl.where(rows <= LIMITS.partial_rows, cost, 1 << 62)
    level = tl.argmin(cost, 0, tie_break_left=True)
    return tl.where(level == LEVELS - 1, WHOLE_DOUBLINGS, level), most_tokens


@triton.jit
def own_doublings(lengths, LIMITS: tl.constexpr):
    """Of each request's splits by its own lengths alone: one doubling at least, and OWN_SPLITS rows at most.

    What a request's result is made of, in which order, then is the same in every batch.
    """
    most_splits = LIMITS.own_splits // tl.maximum(lengths.decode_query, 1)
    wanted = tl.cdiv(lengths.keys, most_splits)
    doublings = tl.zeros_like(wanted) + 1
    for level in tl.static_range(1, MOST_DOUBLINGS):
        doublings += ((LIMITS.split_base << level) < wanted).to(tl.int32)
    return doublings


@triton.jit
def doublings_of(lengths, chosen, LIMITS: tl.constexpr):
    """Of the splits of each request: `chosen`, or its own."""
    if LIMITS.own_splits > 0:
        return own_doublings(lengths, LIMITS)
    else:
        return tl.zeros_like(lengths.keys) + chosen


@triton.jit
def work_of(lengths, chosen, LIMITS: tl.constexpr):
    doublings = doublings_of(lengths, chosen, LIMITS)
    splits = tl.where(lengths.decode_query > 0, num_splits_of(lengths.keys, doublings, LIMITS), 0)
    merge = tl.where(splits > 1, lengths.decode_query, 0)
    tiles = tl.where(lengths.query > LIMITS.decode_tokens, tl.cdiv(lengths.query, LIMITS.tile_tokens), 0)
    return Work(prefill=tiles, decode=splits, merge=merge, partial=merge * splits)


@triton.jit
def work_before(cu_seqlens_q, seq_lens, first, chosen, LIMITS: tl.constexpr, BLOCK: tl.constexpr):
    """What the requests before `first` bring together."""
    prefill = tl.cast(0, tl.int64)
    decode = tl.cast(0, tl.int64)
    merge = tl.cast(0, tl.int64)
    partial = tl.cast(0, tl.int64)
    for start in range(0, first, BLOCK):
        requests = start + tl.arange(0, BLOCK)
        work = work_of(load_lengths(cu_seqlens_q, seq_lens, requests, first, LIMITS), chosen, LIMITS)
        more_prefill, more_decode = sum_both(work.prefill, work.decode)
        more_merge, more_partial = sum_both(work.merge, work.partial)
        prefill += more_prefill
        decode += more_decode
        merge += more_merge
        partial += more_partial
    return Work(
        prefill=prefill.to(tl.int32), decode=decode.to(tl.int32), merge=merge.to(tl.int32), partial=partial.to(tl.int32)
    )


@triton.jit(
    do_not_specialize=[
        "num_requests",
        "max_prefill_items",
        "max_decode_items",
        "max_merge_items",
        "request_programs",
        "programs",
    ]
)
def write_plan(
    cu_seqlens_q, seq_lens, counts, prefill_items, decode_items, merge_items,
    num_requests, max_prefill_items, max_decode_items, max_merge_items, request_programs, programs,
    LIMITS: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """The whole plan. A program's share are some requests in a row; behind the last there is one place for the ends."""
    share = tl.cdiv(tl.cdiv(num_requests + 1, SHARE), tl.num_programs(0)) * SHARE
    first = tl.program_id(0) * share
    chosen, most_tokens = choose_split(cu_seqlens_q, seq_lens, num_requests, request_programs, programs, LIMITS, BLOCK)
    before = work_before(cu_seqlens_q, seq_lens, tl.minimum(first, num_requests), chosen, LIMITS, BLOCK)
    prefill = before.prefill
    decode = before.decode
    merge = before.merge
    partial = before.partial
    for start in range(first, tl.minimum(first + share, num_requests + 1), SHARE):
        requests = start + tl.arange(0, SHARE)
        lengths = load_lengths(cu_seqlens_q, seq_lens, requests, num_requests, LIMITS)
        work = work_of(lengths, chosen, LIMITS)
        first_prefill = prefill + tl.cumsum(work.prefill, 0) - work.prefill
        first_decode = decode + tl.cumsum(work.decode, 0) - work.decode
        first_merge = merge + tl.cumsum(work.merge, 0) - work.merge
        first_partial = partial + tl.cumsum(work.partial, 0) - work.partial
        span = Span(first_row=lengths.first_row, query_len=lengths.query, seq_len=lengths.keys)
        doublings = doublings_of(lengths, chosen, LIMITS)
        shared = Item(
            request=requests,
            index=None,
            span=span,
            num_splits=work.decode,
            first_partial=first_partial,
            split_keys=tl.where(doublings == WHOLE_DOUBLINGS, WHOLE, LIMITS.split_base << doublings),
        )
        list_items(prefill_items, max_prefill_items, first_prefill, work.prefill, shared)
        list_items(decode_items, max_decode_items, first_decode, work.decode, shared)
        list_items(merge_items, max_merge_items, first_merge, work.merge, shared)
        is_end = requests == num_requests
        count = counts + tl.zeros_like(requests)
        tl.store(count + NUM_PREFILL_ITEMS, tl.minimum(first_prefill, max_prefill_items), mask=is_end)
        tl.store(count + NUM_DECODE_ITEMS, tl.minimum(first_decode, max_decode_items), mask=is_end)
        tl.store(count + NUM_MERGE_ITEMS, tl.minimum(first_merge, max_merge_items), mask=is_end)
        tl.store(count + NUM_PARTIAL_ROWS, first_partial, mask=is_end)
        tl.store(count + NUM_ROWS, lengths.first_row, mask=is_end)
        tl.store(count + ONE_TILE, tl.zeros_like(requests) + (1 if LIMITS.own_splits > 0 else 0), mask=is_end)
        tl.store(count + MOST_DECODE_TOKENS, most_tokens + tl.zeros_like(requests), mask=is_end)
        prefill += tl.sum(work.prefill, 0)
        decode += tl.sum(work.decode, 0)
        merge += tl.sum(work.merge, 0)
        partial += tl.sum(work.partial, 0)
