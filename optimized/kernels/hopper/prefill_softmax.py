"""From raw scores to weights, with the meaning of kernels/tiles.py."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ..tiles import finite_maximum, shape_scores, update_softmax


@gluon.jit
def update_scaled(scores, scale, maximum, total):
    """`update_softmax` of scores * scale, for a scale that is not negative: one fused multiply-add for each weight."""
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale)
    stand_in = finite_maximum(new_maximum)
    weights = gl.exp2(scores * scale - stand_in[:, None])
    rescale = gl.exp2(maximum - stand_in)
    return weights, rescale, new_maximum, total * rescale + gl.sum(weights, 1)


@gluon.jit
def row_limits(rows, numbers, start, end, CAUSAL: gl.constexpr):
    """The keys [first, last) that each row sees of [start, end): two vectors, which cost a comparison each per key."""
    first = gl.full(rows.positions.shape, 0, gl.int32, rows.positions.type.layout) + start
    last = gl.full(rows.positions.shape, 0, gl.int32, rows.positions.type.layout) + end
    if CAUSAL:
        last = gl.minimum(last, rows.positions + 1)
    elif numbers.right_window is not None:
        last = gl.minimum(last, rows.positions + numbers.right_window + 1)
    if numbers.sliding_window is not None:
        first = gl.maximum(first, rows.positions - numbers.sliding_window + 1)
    return first, last


@gluon.jit
def weigh(scores, scale, first_key, limits, rows, rules, maximum, total, MASKED: gl.constexpr, WINDOW: gl.constexpr):
    """One step of the online softmax over raw scores [rows, keys], as `update_softmax` returns it.

    MASKED: some row may not see all keys of the tile. WINDOW: some row may not see its first ones.
    """
    if MASKED or rules.softcap is not None or rules.alibi_slopes is not None:
        columns = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        scores = shape_scores(scores * scale, first_key + columns, rows, rules)
        if MASKED:
            # After the scale, which may be 0.
            first, last = limits
            visible = columns[None, :] < (last - first_key)[:, None]
            if WINDOW:
                visible = visible & (columns[None, :] >= (first - first_key)[:, None])
            scores = gl.where(visible, scores, float("-inf"))
        return update_softmax(scores, maximum, total)
    else:
        return update_scaled(scores, scale, maximum, total)
