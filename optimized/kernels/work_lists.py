"""What the plan hands to attention: how much there is of everything, and lists of items, each with all that is asked of
its request.

A program of attention begins with loads that wait for each other, 0.8 to 1 us each where memory is cold: how many items
there are, which is its own, where that one's pages are, its keys. So an item is a record of eight words, one sector of
memory, and nothing has to be looked up by its request but the block table. Decode and merge do not even wait for the
first of these: where their first item is, if nothing is unusual, they know from the program's number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .groups import Item, Span

# Places in `counts`, one sector too.
NUM_PREFILL_ITEMS = tl.constexpr(0)
NUM_DECODE_ITEMS = tl.constexpr(1)
NUM_MERGE_ITEMS = tl.constexpr(2)
NUM_PARTIAL_ROWS = tl.constexpr(3)
ONE_TILE = tl.constexpr(4)  # whether decode takes one kind of tile whatever the batch is
MOST_DECODE_TOKENS = tl.constexpr(5)  # of one request of the decode list
NUM_ROWS = tl.constexpr(6)  # of all requests; those behind them are padding
NUM_COUNTS = 7

# Places in a record.
REQUEST = tl.constexpr(0)
INDEX = tl.constexpr(1)
FIRST_ROW = tl.constexpr(2)
QUERY_LEN = tl.constexpr(3)
SEQ_LEN = tl.constexpr(4)
NUM_SPLITS = tl.constexpr(5)
FIRST_PARTIAL = tl.constexpr(6)
SPLIT_KEYS = tl.constexpr(7)
RECORD = tl.constexpr(8)

ITEMS_STEP = tl.constexpr(32)  # of one request, written at once


@triton.jit
def load_item(items, place):
    """The `place`-th item of a list."""
    record = items + RECORD * place
    span = Span(
        first_row=tl.load(record + FIRST_ROW),
        query_len=tl.load(record + QUERY_LEN),
        seq_len=tl.load(record + SEQ_LEN),
    )
    return Item(
        request=tl.load(record + REQUEST),
        index=tl.load(record + INDEX),
        span=span,
        num_splits=tl.load(record + NUM_SPLITS),
        first_partial=tl.load(record + FIRST_PARTIAL),
        split_keys=tl.load(record + SPLIT_KEYS),
    )


@triton.jit
def list_items(items, max_items, first_items, num_items, shared):
    """Write the items of some requests. shared: an Item of vectors, what those of a request have in common."""
    for start in range(0, tl.max(num_items, 0), ITEMS_STEP):
        index = start + tl.arange(0, ITEMS_STEP)[None, :] + tl.zeros_like(num_items)[:, None]
        place = first_items[:, None] + index
        # Lengths above the capacity bring more items than the lists hold: those are left out, nothing is overrun.
        mask = (index < num_items[:, None]) & (place < max_items)
        record = items + RECORD * place
        tl.store(record + REQUEST, shared.request[:, None], mask=mask)
        tl.store(record + INDEX, index, mask=mask)
        tl.store(record + FIRST_ROW, shared.span.first_row[:, None], mask=mask)
        tl.store(record + QUERY_LEN, shared.span.query_len[:, None], mask=mask)
        tl.store(record + SEQ_LEN, shared.span.seq_len[:, None], mask=mask)
        tl.store(record + NUM_SPLITS, shared.num_splits[:, None], mask=mask)
        tl.store(record + FIRST_PARTIAL, shared.first_partial[:, None], mask=mask)
        tl.store(record + SPLIT_KEYS, shared.split_keys[:, None], mask=mask)
