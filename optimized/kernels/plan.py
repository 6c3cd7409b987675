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

# Places in `counts`.
NUM_PREFILL_ITEMS = tl.constexpr(0)
NUM_DECODE_ITEMS = tl.constexpr(1)
NUM_MERGE_ITEMS = tl.constexpr(2)
NUM_PARTIAL_ROWS = tl.constexpr(3)
SPLIT_KEYS = tl.constexpr(4)
MOST_DECODE_TOKENS = tl.constexpr(5)  # of one request of the decode list
NUM_COUNTS = 6

# A split this long is never cut: capacities stay below it. It is the last level; so many doublings make it.
WHOLE = tl.constexpr(1 << 30)
WHOLE_DOUBLINGS = tl.constexpr(30)
LEVELS = tl.constexpr(16)

ITEMS_STEP = tl.constexpr(32)  # of one request, written at once


class Lengths(NamedTuple):
    """Of some requests; 0 where there is none."""

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
    start = tl.load(cu_seqlens_q + requests, mask=mask, other=0)
    end = tl.load(cu_seqlens_q + requests + 1, mask=mask, other=0)
    keys = tl.load(seq_lens + requests, mask=mask, other=0)
    query = end - start
    decode_query = tl.where((query > 0) & (query <= LIMITS.decode_tokens), query, 0)
    return Lengths(query=query, decode_query=decode_query, keys=tl.maximum(keys, 0))


@triton.jit
def num_splits(seq_len, split_keys):
    """A request without keys still has one split: its rows must be written."""
    return tl.maximum((seq_len + split_keys - 1) // split_keys, 1)


@triton.jit
def num_splits_of(keys, doublings, LIMITS: tl.constexpr):
    """`num_splits` for a split of split_base * 2^doublings keys, without a division."""
    shortest = tl.cdiv(keys, LIMITS.split_base)
    return tl.maximum((shortest + (1 << doublings) - 1) >> doublings, 1)


@triton.jit
def first_partial_row(offsets, request):
    """Where the partial results of a split request begin."""
    return tl.load(offsets + request)


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
def work_of(lengths, doublings, LIMITS: tl.constexpr):
    splits = tl.where(lengths.decode_query > 0, num_splits_of(lengths.keys, doublings, LIMITS), 0)
    merge = tl.where(splits > 1, lengths.decode_query, 0)
    tiles = tl.where(lengths.query > LIMITS.decode_tokens, tl.cdiv(lengths.query, LIMITS.tile_tokens), 0)
    return Work(prefill=tiles, decode=splits, merge=merge, partial=merge * splits)


@triton.jit
def work_before(cu_seqlens_q, seq_lens, first, doublings, LIMITS: tl.constexpr, BLOCK: tl.constexpr):
    """What the requests before `first` bring together."""
    prefill = tl.cast(0, tl.int64)
    decode = tl.cast(0, tl.int64)
    merge = tl.cast(0, tl.int64)
    partial = tl.cast(0, tl.int64)
    for start in range(0, first, BLOCK):
        requests = start + tl.arange(0, BLOCK)
        work = work_of(load_lengths(cu_seqlens_q, seq_lens, requests, first, LIMITS), doublings, LIMITS)
        more_prefill, more_decode = sum_both(work.prefill, work.decode)
        more_merge, more_partial = sum_both(work.merge, work.partial)
        prefill += more_prefill
        decode += more_decode
        merge += more_merge
        partial += more_partial
    return Work(
        prefill=prefill.to(tl.int32), decode=decode.to(tl.int32), merge=merge.to(tl.int32), partial=partial.to(tl.int32)
    )


@triton.jit
def list_items(items, max_items, requests, first_items, num_items):
    """Write (request, index within the request) for every item of these requests."""
    for start in range(0, tl.max(num_items, 0), ITEMS_STEP):
        index = start + tl.arange(0, ITEMS_STEP)[None, :] + tl.zeros_like(requests)[:, None]
        item = first_items[:, None] + index
        # Lengths above the capacity bring more items than the lists hold: those are left out, nothing is overrun.
        mask = (index < num_items[:, None]) & (item < max_items)
        tl.store(items + 2 * item, requests[:, None] + tl.zeros_like(index), mask=mask)
        tl.store(items + 2 * item + 1, index, mask=mask)


@triton.jit(do_not_specialize=["num_requests", "max_prefill_items", "max_decode_items", "request_programs", "programs"])
def write_plan(
    cu_seqlens_q, seq_lens, counts, offsets, prefill_items, decode_items, merge_items,
    num_requests, max_prefill_items, max_decode_items, request_programs, programs,
    LIMITS: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """The whole plan. A program's share are some requests in a row; behind the last there is one place for the ends."""
    share = tl.cdiv(tl.cdiv(num_requests + 1, SHARE), tl.num_programs(0)) * SHARE
    first = tl.program_id(0) * share
    doublings, most_tokens = choose_split(
        cu_seqlens_q, seq_lens, num_requests, request_programs, programs, LIMITS, BLOCK
    )
    before = work_before(cu_seqlens_q, seq_lens, tl.minimum(first, num_requests), doublings, LIMITS, BLOCK)
    prefill = before.prefill
    decode = before.decode
    merge = before.merge
    partial = before.partial
    for start in range(first, tl.minimum(first + share, num_requests + 1), SHARE):
        requests = start + tl.arange(0, SHARE)
        work = work_of(load_lengths(cu_seqlens_q, seq_lens, requests, num_requests, LIMITS), doublings, LIMITS)
        first_prefill = prefill + tl.cumsum(work.prefill, 0) - work.prefill
        first_decode = decode + tl.cumsum(work.decode, 0) - work.decode
        first_merge = merge + tl.cumsum(work.merge, 0) - work.merge
        first_partial = partial + tl.cumsum(work.partial, 0) - work.partial
        list_items(prefill_items, max_prefill_items, requests, first_prefill, work.prefill)
        list_items(decode_items, max_decode_items, requests, first_decode, work.decode)
        list_items(merge_items, LIMITS.partial_rows, requests, first_merge, work.merge)
        tl.store(offsets + requests, first_partial, mask=requests <= num_requests)
        is_end = requests == num_requests
        split_keys = tl.where(doublings == WHOLE_DOUBLINGS, WHOLE, LIMITS.split_base << doublings)
        count = counts + tl.zeros_like(requests)
        tl.store(count + NUM_PREFILL_ITEMS, tl.minimum(first_prefill, max_prefill_items), mask=is_end)
        tl.store(count + NUM_DECODE_ITEMS, tl.minimum(first_decode, max_decode_items), mask=is_end)
        tl.store(count + NUM_MERGE_ITEMS, first_merge, mask=is_end)
        tl.store(count + NUM_PARTIAL_ROWS, first_partial, mask=is_end)
        tl.store(count + SPLIT_KEYS, split_keys + tl.zeros_like(requests), mask=is_end)
        tl.store(count + MOST_DECODE_TOKENS, most_tokens + tl.zeros_like(requests), mask=is_end)
        prefill += tl.sum(work.prefill, 0)
        decode += tl.sum(work.decode, 0)
        merge += tl.sum(work.merge, 0)
        partial += tl.sum(work.partial, 0)
