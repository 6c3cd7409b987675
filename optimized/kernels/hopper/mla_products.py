"""What both warp groups do alike: the products with q, the softmax of one tile, and the finished rows."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..groups import State
from ..tiles import LOG2_E, finish, shape_scores, store_lse, visible_keys
from .layouts import CHUNK, synchronise
from .mla_layouts import COPIED, HALF, KEYS, OUTPUT, RANK, ROPE, ROWS, SCORES, STORED, SWIZZLED
from .mla_work import query_rows


@gluon.jit
def whole(buffer, COLUMNS: gl.constexpr, zero):
    """The boxes of a buffer as one [64, COLUMNS] tile, at an address that the compiler takes for a new one each time.

    Else it makes the descriptors of all products before the loop, and spills what does not fit into the registers.
    `zero` is always 0: the width of a query bias, which there is none of.
    """
    return buffer._reinterpret(buffer.dtype, [1, KEYS, COLUMNS], SWIZZLED).index(zero)


@gluon.jit
def clear_rows(tile, first_key, work, COLUMNS: gl.constexpr):
    """Zeros for keys out of [start, end): what lies there may be NaN, which a weight of 0 does not remove."""
    keys = first_key + gl.arange(0, KEYS, layout=gl.SliceLayout(1, COPIED))
    readable = (keys >= work.start) & (keys < work.end)
    for chunk in gl.static_range(COLUMNS // CHUNK):
        part = tile.slice(chunk * CHUNK, CHUNK, dim=1)
        found = part.load(COPIED)
        part.store(gl.where(readable[:, None], found, gl.zeros([KEYS, CHUNK], tile.dtype, COPIED)))
    fence_async_shared()
    synchronise()


@gluon.jit
def reaches_out(first_key, work):
    """Whether some key of the tile is out of [start, end)."""
    return (first_key < work.start) | (first_key + KEYS > work.end)


@gluon.jit
def load_rope(work, queries, SIZES: gl.constexpr):
    """The rotary part of q, in registers."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    rows = query_rows(work, LAYOUT, SIZES).rows
    columns = gl.arange(0, ROPE, layout=gl.SliceLayout(0, LAYOUT))
    place = rows.tokens.to(gl.int64) * queries.rope_stride_token + rows.heads.to(gl.int64) * queries.rope_stride_head
    return gl.load(queries.rope + place[:, None] + columns[None, :], mask=rows.mask[:, None], other=0.0)


@gluon.jit
def begin_scores(q_half, q_rope, half, rope, first_key, work, zero):
    """Start the products with the half that the warp group sums itself, and with the rotary part."""
    if reaches_out(first_key, work):
        clear_rows(whole(half, HALF, zero), first_key, work, HALF)
        clear_rows(whole(rope, ROPE, zero), first_key, work, ROPE)
    scores = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    keys = whole(half, HALF, zero).permute((1, 0))
    scores = warpgroup_mma(whole(q_half, HALF, zero), keys, scores, use_acc=False, is_async=True)
    return warpgroup_mma(q_rope, whole(rope, ROPE, zero).permute((1, 0)), scores, is_async=True)


@gluon.jit
def end_scores(scores, q_half, half, first_key, work, zero):
    """Those with the other half."""
    if reaches_out(first_key, work):
        clear_rows(whole(half, HALF, zero), first_key, work, HALF)
    keys = whole(half, HALF, zero).permute((1, 0))
    scores = warpgroup_mma(whole(q_half, HALF, zero), keys, scores, is_async=True)
    return warpgroup_mma_wait(0, [scores])


@gluon.jit
def shaped(scores, first_key, work, job, SIZES: gl.constexpr):
    """Products as base-2 logits; those of keys that a row does not see are -inf."""
    rules = job.step.rules
    softmax_scale = rules.softmax_scale
    if rules.softcap is None:
        softmax_scale = softmax_scale * LOG2_E
    tile = query_rows(work, SCORES, SIZES)
    keys = first_key + gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
    scores = shape_scores(scores * softmax_scale, keys, tile, rules)
    if (first_key < work.inner_start) | (first_key + KEYS > work.inner_end):
        readable = (keys >= work.start) & (keys < work.end)
        visible = visible_keys(keys, readable, tile, job.numbers, SIZES.causal)
        scores = gl.where(visible, scores, float("-inf"))
    return scores


@gluon.jit
def as_operand(weights, buffer):
    """Weights as the left operand of a product, from registers."""
    return gl.convert_layout(weights.to(buffer.dtype), gl.DotOperandLayout(0, OUTPUT, 2))


@gluon.jit
def spread(rows):
    """A value per row of the scores, as a value per row of the output."""
    return gl.convert_layout(rows, gl.SliceLayout(1, OUTPUT))[:, None]


@gluon.jit
def release(barrier):
    """Say, once all threads of the warp group have read it, that a buffer is empty."""
    synchronise()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def join_totals(running, mine, other, works):
    """The sum of both warp groups' weights."""
    mine.total.store(running.total)
    release(mine.total_ready)
    mbarrier.wait(other.total_ready, works & 1)
    return running.total + other.total.load(gl.SliceLayout(1, SCORES))


@gluon.jit
def quarters(out):
    """Columns 0 to 63 of [64, 256], and the three times 64 behind them."""
    first, second = gl.split(gl.permute(gl.reshape(out, [ROWS, 2, HALF // 2]), [0, 2, 1]))
    one, two = gl.split(gl.permute(gl.reshape(first, [ROWS, 2, CHUNK]), [0, 2, 1]))
    three, four = gl.split(gl.permute(gl.reshape(second, [ROWS, 2, CHUNK]), [0, 2, 1]))
    return one, two, three, four


@gluon.jit
def store_wide(out, work, outputs, buffer, COLUMN: gl.constexpr, SIZES: gl.constexpr):
    """By way of a buffer [64, 64] that nobody reads any more: a thread writes 16 bytes at once, not 4."""
    staged = buffer._reinterpret(out.dtype, [ROWS, CHUNK], SWIZZLED)
    rows = query_rows(work, STORED, SIZES).rows
    place = rows.tokens.to(gl.int64) * outputs.stride_token + rows.heads.to(gl.int64) * outputs.stride_head
    columns = COLUMN + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, STORED))
    pointers = outputs.out + place[:, None] + columns[None, :]
    parts = quarters(out)
    for quarter in gl.static_range(HALF // CHUNK):
        staged.store(gl.convert_layout(parts[quarter], SCORES))
        synchronise()
        gl.store(pointers + quarter * CHUNK, staged.load(STORED), mask=rows.mask[:, None])
        synchronise()


@gluon.jit
def store_outputs(state, work, job, buffer, COLUMN: gl.constexpr, SIZES: gl.constexpr):
    outputs = job.step.outputs
    rows = query_rows(work, OUTPUT, SIZES).rows
    out, lse = finish(state, job.step.rules, rows)
    if COLUMN == 0:
        store_lse(outputs, lse, rows)
    if outputs.out.dtype.element_ty == gl.float32:
        place = rows.tokens.to(gl.int64) * outputs.stride_token + rows.heads.to(gl.int64) * outputs.stride_head
        columns = COLUMN + gl.arange(0, HALF, layout=gl.SliceLayout(0, OUTPUT))
        gl.store(outputs.out + place[:, None] + columns[None, :], out, mask=rows.mask[:, None])
    else:
        store_wide(out.to(outputs.out.dtype.element_ty), work, outputs, buffer, COLUMN, SIZES)


@gluon.jit
def store_partials(state, work, job, COLUMN: gl.constexpr, SIZES: gl.constexpr):
    partials, item = job.partials, work.item
    tile = query_rows(work, OUTPUT, SIZES)
    mask = tile.rows.mask
    first = item.first_partial + item.index * item.span.query_len
    place = (first + tile.tokens).to(gl.int64) * SIZES.group + tile.rows.heads
    columns = COLUMN + gl.arange(0, HALF, layout=gl.SliceLayout(0, OUTPUT))
    gl.store(partials.weighted + place[:, None] * RANK + columns[None, :], state.weighted, mask=mask[:, None])
    if COLUMN == 0:
        gl.store(partials.maximum + place, state.maximum, mask=mask)
        gl.store(partials.total + place, state.total, mask=mask)


@gluon.jit
def store_half(state, work, job, buffer, COLUMN: gl.constexpr, SIZES: gl.constexpr):
    """Columns [COLUMN, COLUMN + 256) of the rows; maximum, sum and lse are written with the first ones.

    buffer: where the warp group's weights were.
    """
    if work.item.num_splits <= 1:
        store_outputs(state, work, job, buffer, COLUMN, SIZES)
    else:
        store_partials(state, work, job, COLUMN, SIZES)


@gluon.jit
def finished_state(out, maximum, total):
    """The state of finished rows, by rows of the output."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    return State(
        maximum=gl.convert_layout(maximum, LAYOUT), total=gl.convert_layout(total, LAYOUT), weighted=out
    )  # fmt: skip
