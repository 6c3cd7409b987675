"""A consumer's rows: where they are, how their queries are read and their answers written."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..groups import QueryTile, Rows
from ..tiles import LN_2, join_sink, log_sum, saturate, scale_of, store_lse
from .layouts import synchronise


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
def load_queries(q, queries, work, is_negative, WHICH: gl.constexpr, SIZES: gl.constexpr, TILE: gl.constexpr):
    """Fill the consumer's shared memory with its rows of q, with the sign of the softmax scale."""
    COLUMNS: gl.constexpr = q.shape[1]
    LANES: gl.constexpr = min(COLUMNS // 8, 32)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    rows = rows_of(work, WHICH, gl.SliceLayout(1, LAYOUT), SIZES, TILE).rows
    dims = gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    place = rows.tokens.to(gl.int64) * queries.stride_token + rows.heads.to(gl.int64) * queries.stride_head
    mask = rows.mask[:, None] & (dims < SIZES.head_size)[None, :]
    loaded = gl.load(queries.main + place[:, None] + dims[None, :], mask=mask, other=0.0)
    q.store(gl.where(is_negative, -loaded, loaded))
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
    # Nothing visible and no sink: total is 0 and so is the sum.
    out = weighted / gl.convert_layout(gl.where(total > 0.0, total, 1.0), LAYOUT)[:, None]
    if outputs.out.dtype.element_ty == gl.float8e4nv:
        if step.scales.out.base is not None:
            out = gl.div_rn(out, gl.zeros_like(out) + scale_of(step.scales.out, kv_head))
        out = saturate(out)
    dims = gl.arange(0, SIZES.padded_value, gl.SliceLayout(0, weighted.type.layout))
    place = rows.tokens.to(gl.int64) * outputs.stride_token + rows.heads.to(gl.int64) * outputs.stride_head
    mask = gl.convert_layout(rows.mask, LAYOUT)[:, None] & (dims < SIZES.head_size_v)[None, :]
    pointers = outputs.out + gl.convert_layout(place, LAYOUT)[:, None] + dims[None, :]
    gl.store(pointers, out.to(KIND), mask=mask)
