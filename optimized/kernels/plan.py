"""The plan kernels: from the lengths on the device to the work lists that persistent programs walk.

Requests with few new tokens (decode, speculative verification) are split along their keys and merged; the others
are tiled along their queries. How long a split is, is decided here from the whole batch: so that programs have as
much to do as each other, and that the partial results always fit into `partial_rows` rows and no scratch grows with
requests x length.
"""

from __future__ import annotations

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
NUM_OFFSETS = 4  # rows of `offsets`

# A split this long is never cut: capacities stay below it.
WHOLE = tl.constexpr(1 << 30)
LEVELS = tl.constexpr(16)


@triton.jit
def request_lengths(cu_seqlens_q, seq_lens, requests, num_requests):
    mask = requests < num_requests
    start = tl.load(cu_seqlens_q + requests, mask=mask, other=0)
    end = tl.load(cu_seqlens_q + requests + 1, mask=mask, other=0)
    seq_len = tl.load(seq_lens + requests, mask=mask, other=0)
    return end - start, tl.maximum(seq_len, 0)


@triton.jit
def num_splits(seq_len, split_keys):
    """A request without keys still has one split: its rows must be written."""
    return tl.maximum((seq_len + split_keys - 1) // split_keys, 1)


@triton.jit
def first_partial_row(offsets, request, num_requests):
    """Where the partial results of a split request begin."""
    return tl.load(offsets + 3 * (num_requests + 1) + request)


@triton.jit
def choose_split(cu_seqlens_q, seq_lens, num_requests, request_programs, programs, LIMITS: tl.constexpr):
    """The split length, split_base * 2^level, with which `programs` programs are done first.

    Only lengths whose partial results fit into `partial_rows` rows are taken. A program takes splits in turn; a split
    costs its keys, and `split_cost` for what it begins and ends with; a request takes `request_programs` programs at a
    time. Of equally good lengths the shortest.
    """
    levels = tl.arange(0, LEVELS)
    widths = tl.where(levels == LEVELS - 1, WHOLE, LIMITS.split_base << levels)
    rows = tl.zeros([LEVELS], tl.int32)
    items = tl.zeros([LEVELS], tl.int64)
    keys = tl.zeros([LEVELS], tl.int64)
    longest = tl.zeros([LEVELS], tl.int64) + 1
    for start in range(0, num_requests, LIMITS.block):
        requests = start + tl.arange(0, LIMITS.block)
        query_len, seq_len = request_lengths(cu_seqlens_q, seq_lens, requests, num_requests)
        is_decode = (query_len > 0) & (query_len <= LIMITS.decode_tokens)
        seq_len = tl.where(is_decode, seq_len, 0)
        splits = tl.where(is_decode[:, None], num_splits(seq_len[:, None], widths[None, :]), 0)
        # Bounded before the sum, so that long lists of long requests cannot wrap around int32.
        needed = tl.minimum(tl.where(splits > 1, splits * query_len[:, None], 0), LIMITS.partial_rows + 1)
        rows = tl.minimum(rows + tl.sum(needed, 0), LIMITS.partial_rows + 1)
        items += tl.sum(splits.to(tl.int64), 0)
        keys += tl.sum(seq_len.to(tl.int64), 0)
        longest = tl.maximum(longest, tl.max(seq_len, 0))
    length = tl.minimum(widths.to(tl.int64), longest)
    rounds = tl.cdiv(keys * request_programs, programs * length)
    cost = rounds * length + LIMITS.split_cost * tl.cdiv(items * request_programs, programs)
    cost = tl.where(rows <= LIMITS.partial_rows, cost, 1 << 62)
    return tl.min(tl.where(cost == tl.min(cost, 0), widths, WHOLE), 0)


@triton.jit(do_not_specialize=["num_requests", "max_prefill_items", "max_decode_items", "request_programs", "programs"])
def count_work(
    cu_seqlens_q, seq_lens, counts, offsets,
    num_requests, max_prefill_items, max_decode_items, request_programs, programs, LIMITS: tl.constexpr,
):  # fmt: skip
    """One program: how many items each request brings to each list, as running offsets [4, num_requests + 1].

    Rows of `offsets`: prefill items (query tiles), decode items (splits), merge items (rows of split requests),
    partial rows (splits x tokens of split requests).
    """
    split_keys = choose_split(cu_seqlens_q, seq_lens, num_requests, request_programs, programs, LIMITS)
    prefill = 0
    decode = 0
    merge = 0
    partial = 0
    most_decode_tokens = 0
    stride = num_requests + 1
    for start in range(0, num_requests, LIMITS.block):
        requests = start + tl.arange(0, LIMITS.block)
        mask = requests < num_requests
        query_len, seq_len = request_lengths(cu_seqlens_q, seq_lens, requests, num_requests)
        is_decode = (query_len > 0) & (query_len <= LIMITS.decode_tokens)
        splits = num_splits(seq_len, split_keys)
        is_split = is_decode & (splits > 1)
        tiles = tl.where(
            query_len > LIMITS.decode_tokens, (query_len + LIMITS.tile_tokens - 1) // LIMITS.tile_tokens, 0
        )
        units = tl.where(is_decode, splits, 0)
        most_decode_tokens = tl.maximum(most_decode_tokens, tl.max(tl.where(is_decode, query_len, 0), 0))
        merges = tl.where(is_split, query_len, 0)
        partials = tl.where(is_split, splits * query_len, 0)
        tl.store(offsets + requests, prefill + tl.cumsum(tiles, 0) - tiles, mask=mask)
        tl.store(offsets + stride + requests, decode + tl.cumsum(units, 0) - units, mask=mask)
        tl.store(offsets + 2 * stride + requests, merge + tl.cumsum(merges, 0) - merges, mask=mask)
        tl.store(offsets + 3 * stride + requests, partial + tl.cumsum(partials, 0) - partials, mask=mask)
        prefill += tl.sum(tiles, 0)
        decode += tl.sum(units, 0)
        merge += tl.sum(merges, 0)
        partial += tl.sum(partials, 0)
    tl.store(offsets + num_requests, prefill)
    tl.store(offsets + stride + num_requests, decode)
    tl.store(offsets + 2 * stride + num_requests, merge)
    tl.store(offsets + 3 * stride + num_requests, partial)
    # Lengths above the capacity bring more items than the lists hold: those are left out, nothing is overrun.
    tl.store(counts + NUM_PREFILL_ITEMS, tl.minimum(prefill, max_prefill_items))
    tl.store(counts + NUM_DECODE_ITEMS, tl.minimum(decode, max_decode_items))
    tl.store(counts + NUM_MERGE_ITEMS, merge)
    tl.store(counts + NUM_PARTIAL_ROWS, partial)
    tl.store(counts + SPLIT_KEYS, split_keys)
    tl.store(counts + MOST_DECODE_TOKENS, most_decode_tokens)


@triton.jit
def list_items(num_items, offsets, items, num_requests, BLOCK: tl.constexpr):
    """Write (request, index within the request) for every item, by bisection in the running offsets."""
    for start in range(tl.program_id(0) * BLOCK, num_items, tl.num_programs(0) * BLOCK):
        item = start + tl.arange(0, BLOCK)
        mask = item < num_items
        # The last request whose offset is not above the item; requests without items share their offset with
        # the next one and so are never the last.
        low = tl.zeros([BLOCK], tl.int32)
        high = tl.zeros([BLOCK], tl.int32) + num_requests
        width = num_requests
        while width > 0:
            middle = (low + high + 1) // 2
            # `high` stays at num_requests only while nothing above was seen; its offset is above every item.
            below = tl.load(offsets + middle, mask=mask, other=0) <= item
            low = tl.where(below, middle, low)
            high = tl.where(below, high, middle - 1)
            width = width // 2
        first = tl.load(offsets + low, mask=mask, other=0)
        tl.store(items + 2 * item, low, mask=mask)
        tl.store(items + 2 * item + 1, item - first, mask=mask)


@triton.jit(do_not_specialize=["num_requests"])
def list_work(counts, offsets, prefill_items, decode_items, merge_items, num_requests, BLOCK: tl.constexpr):
    stride = num_requests + 1
    list_items(tl.load(counts + NUM_PREFILL_ITEMS), offsets, prefill_items, num_requests, BLOCK)
    list_items(tl.load(counts + NUM_DECODE_ITEMS), offsets + stride, decode_items, num_requests, BLOCK)
    list_items(tl.load(counts + NUM_MERGE_ITEMS), offsets + 2 * stride, merge_items, num_requests, BLOCK)
