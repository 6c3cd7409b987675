"""Which rows and keys a program has: one of the plan's lists, walked by every role of the program alike."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ..decode import split_range
from ..groups import QueryTile, Rows
from ..tiles import inner_range, key_range
from ..work_lists import MOST_DECODE_TOKENS, NUM_DECODE_ITEMS, NUM_PREFILL_ITEMS, load_item
from .mla_groups import Bounds, Work
from .mla_layouts import KEYS, ROWS


@gluon.jit
def num_row_tiles(job, SIZES: gl.constexpr, PREFILL: gl.constexpr):
    """Of an item of the list. They are neighbours, and read the same keys at the same time."""
    if PREFILL:
        return (SIZES.tile_tokens * SIZES.group + ROWS - 1) // ROWS
    else:  # as many as the longest request needs
        return gl.cdiv(gl.load(job.step.work.counts + MOST_DECODE_TOKENS) * SIZES.group, ROWS)


@gluon.jit
def num_works(job, SIZES: gl.constexpr, PREFILL: gl.constexpr):
    items = gl.load(job.step.work.counts + (NUM_PREFILL_ITEMS if PREFILL else NUM_DECODE_ITEMS))
    return items * num_row_tiles(job, SIZES, PREFILL)


@gluon.jit
def find_rows(job, index, SIZES: gl.constexpr, PREFILL: gl.constexpr):
    """(item, first pair, end token) of a work."""
    work, row_tiles = job.step.work, num_row_tiles(job, SIZES, PREFILL)
    if PREFILL:  # the last tiles of a causal request see most keys: they come first
        index = num_works(job, SIZES, PREFILL) - 1 - index
    item = load_item(work.prefill_items if PREFILL else work.decode_items, index // row_tiles)
    first_pair = index % row_tiles * ROWS
    end_token = item.span.query_len
    if PREFILL:
        first_pair += item.index * (SIZES.tile_tokens * SIZES.group)
        end_token = gl.minimum(end_token, (item.index + 1) * SIZES.tile_tokens)
    return item, first_pair, end_token


@gluon.jit
def find_work(job, index, BOX: gl.constexpr, SIZES: gl.constexpr, PREFILL: gl.constexpr):
    step = job.step
    item, first_pair, end_token = find_rows(job, index, SIZES, PREFILL)
    span = item.span
    context = span.seq_len - span.query_len
    last_pair = gl.minimum(first_pair + ROWS, end_token * SIZES.group) - 1
    bounds = Bounds(context + first_pair // SIZES.group, context + last_pair // SIZES.group)
    start, end = key_range(bounds, span, job.numbers, SIZES.causal)
    if not PREFILL:
        start, end = split_range(start, end, item.index, item.split_keys)
    inner_start, inner_end = inner_range(bounds, job.numbers, start, end, SIZES.causal)
    first_key = start // BOX * BOX
    num_steps = gl.where(end > start, gl.cdiv(end - first_key, 2 * KEYS), 0)
    table = step.requests.block_table + item.request.to(gl.int64) * job.numbers.table_stride
    return Work(item, first_pair, end_token, first_key, start, end, inner_start, inner_end, num_steps, table)


@gluon.jit
def has_rows(work, SIZES: gl.constexpr):
    """Short requests have fewer tiles of rows than the longest, and short items fewer than others."""
    return work.first_pair < work.end_token * SIZES.group


@gluon.jit
def query_rows(work, LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """The rows of the tile, one per row of `LAYOUT`."""
    span = work.item.span
    pairs = work.first_pair + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    tokens = pairs // SIZES.group
    context = span.seq_len - span.query_len
    return QueryTile(
        request=work.item.request,
        kv_head=0,
        rows=Rows(tokens=span.first_row + tokens, heads=pairs % SIZES.group, mask=tokens < work.end_token),
        tokens=tokens,
        positions=context + tokens,
        context=context,
        first_position=context + work.first_pair // SIZES.group,
        last_position=context + span.query_len - 1,
    )
