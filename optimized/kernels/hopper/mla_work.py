"""Which rows and keys a program has: the plan's decode list, walked by every role of the program alike."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ..decode import split_range
from ..groups import QueryTile, Rows
from ..tiles import inner_range, key_range
from ..work_lists import MOST_DECODE_TOKENS, NUM_DECODE_ITEMS, SPLIT_KEYS, load_item
from .mla_groups import Bounds, Work
from .mla_layouts import KEYS, ROWS


@gluon.jit
def num_row_tiles(job, SIZES: gl.constexpr):
    """Of the longest request. Those of one request's split are neighbours, and read the same keys at the same time."""
    return gl.cdiv(gl.load(job.step.work.counts + MOST_DECODE_TOKENS) * SIZES.group, ROWS)


@gluon.jit
def num_works(job, SIZES: gl.constexpr):
    return gl.load(job.step.work.counts + NUM_DECODE_ITEMS) * num_row_tiles(job, SIZES)


@gluon.jit
def find_work(job, index, BOX: gl.constexpr, SIZES: gl.constexpr):
    step = job.step
    row_tiles = num_row_tiles(job, SIZES)
    item = load_item(step.work.decode_items, index // row_tiles)
    span = item.span
    first_pair = index % row_tiles * ROWS
    context = span.seq_len - span.query_len
    last_pair = gl.minimum(first_pair + ROWS, span.query_len * SIZES.group) - 1
    bounds = Bounds(context + first_pair // SIZES.group, context + last_pair // SIZES.group)
    start, end = key_range(bounds, span, job.numbers, SIZES.causal)
    start, end = split_range(start, end, item.index, gl.load(step.work.counts + SPLIT_KEYS))
    inner_start, inner_end = inner_range(bounds, job.numbers, start, end, SIZES.causal)
    first_key = start // BOX * BOX
    num_steps = gl.where(end > start, gl.cdiv(end - first_key, 2 * KEYS), 0)
    table = step.block_table + item.request.to(gl.int64) * job.numbers.table_stride
    return Work(item, first_pair, first_key, start, end, inner_start, inner_end, num_steps, table)


@gluon.jit
def has_rows(work, SIZES: gl.constexpr):
    """Short requests have fewer tiles of rows than the longest."""
    return work.first_pair < work.item.span.query_len * SIZES.group


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
        rows=Rows(tokens=span.first_row + tokens, heads=pairs % SIZES.group, mask=tokens < span.query_len),
        tokens=tokens,
        positions=context + tokens,
        context=context,
        first_position=context + work.first_pair // SIZES.group,
        last_position=context + span.query_len - 1,
    )
