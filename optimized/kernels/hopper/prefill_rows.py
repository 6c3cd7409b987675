"""A consumer's rows: where they are, how their queries come and their answers written."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..groups import QueryTile, Rows
from ..tiles import LN_2, join_sink, log_sum, saturate, scale_of, store_lse
from .layouts import stored_layout, synchronise


@gluon.jit
def rows_of(work, WHICH: gl.constexpr, LAYOUT: gl.constexpr, SIZES: gl.constexpr, TILE: gl.constexpr):
    """The consumer's part of the work's rows, one per entry of a vector with this layout."""
    first = work.first_flat + WHICH * TILE.rows
    flat = first + gl.arange(0, TILE.rows, LAYOUT)
    tokens = work.first_token + flat // SIZES.group
    last_token = gl.minimum(work.first_token + (first + TILE.rows - 1) // SIZES.group, work.end_token - 1)
    return QueryTile(
        request=work.request,
        kv_head=work.kv_head,
        rows=Rows(
            tokens=work.first_row + tokens,
            heads=work.kv_head * SIZES.group + flat % SIZES.group,
            mask=tokens < work.end_token,
        ),
        tokens=tokens,
        positions=work.context + tokens,
        context=work.context,
        first_position=work.context + work.first_token + first // SIZES.group,
        last_position=work.context + last_token,
    )


@gluon.jit
def copy_queries(q, queries, work, WHICH: gl.constexpr, SIZES: gl.constexpr, TILE: gl.constexpr):
    """Ask for the consumer's rows of q in its shared memory, which nobody may be reading; zeros for those too many.

    Asked for before the work before is finished, they come while it is.
    """
    COLUMNS: gl.constexpr = q.shape[1]
    LANES: gl.constexpr = min(COLUMNS // 8, 32)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    flat = work.first_flat + WHICH * TILE.rows + gl.arange(0, TILE.rows, gl.SliceLayout(1, LAYOUT))
    tokens, heads = flat // SIZES.group, flat % SIZES.group
    dims = gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    row = (work.first_row + work.first_token).to(gl.int64)
    first = row * queries.stride_token + (work.kv_head * SIZES.group).to(gl.int64) * queries.stride_head
    # From there on 32 bits are enough, and all is a multiple of 8, as the launch has made sure of.
    place = gl.multiple_of(tokens * queries.stride_token + heads * queries.stride_head, 8)
    mask = (work.first_token + tokens < work.end_token)[:, None] & (dims < SIZES.head_size)[None, :]
    source = queries.main + gl.multiple_of(first, 8)
    async_copy.async_copy_global_to_shared(q, source + (place[:, None] + dims[None, :]), mask)
    async_copy.commit_group()


@gluon.jit
def await_queries():
    """Until what `copy_queries` asked for is there for the tensor cores, whichever thread has brought it."""
    async_copy.wait_group(0)
    fence_async_shared()
    synchronise()


@gluon.jit
def store_rows(step, rows, kv_head, maximum, total, weighted, SIZES: gl.constexpr):
    """Sink, division, logarithm: write out and lse of rows that have seen all their keys."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, weighted.type.layout)
    outputs, rules = step.outputs, step.rules
    KIND: gl.constexpr = outputs.out.dtype.element_ty
    if rules.sinks is not None:
        sinks = gl.load(rules.sinks + rows.heads, mask=rows.mask, other=float("-inf"))
        rescale, maximum, total = join_sink(maximum, total, sinks)
        weighted = weighted * gl.convert_layout(rescale, LAYOUT)[:, None]
    store_lse(outputs, log_sum(maximum * LN_2, total), rows)
    # Nothing visible and no sink: total is 0 and so is the sum. One division for a row, not one for each column.
    one = gl.full(total.shape, 1.0, gl.float32, total.type.layout)
    inverse = gl.div_rn(one, gl.where(total > 0.0, total, one))
    out = weighted * gl.convert_layout(inverse, LAYOUT)[:, None]
    if outputs.out.dtype.element_ty == gl.float8e4nv:
        if step.scales.out.base is not None:
            out = gl.div_rn(out, gl.zeros_like(out) + scale_of(step.scales.out, kv_head))
        out = saturate(out)
    out = gl.convert_layout(out.to(KIND), stored_layout(SIZES.padded_value))
    ROW: gl.constexpr = gl.SliceLayout(1, out.type.layout)
    dims = gl.arange(0, SIZES.padded_value, gl.SliceLayout(0, out.type.layout))
    place = rows.tokens.to(gl.int64) * outputs.stride_token + rows.heads.to(gl.int64) * outputs.stride_head
    mask = gl.convert_layout(rows.mask, ROW)[:, None] & (dims < SIZES.head_size_v)[None, :]
    pointers = outputs.out + gl.convert_layout(place, ROW)[:, None] + dims[None, :]
    gl.store(pointers, out, mask=mask)
