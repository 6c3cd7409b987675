"""From raw scores to weights, with the meaning of kernels/tiles.py."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ..tiles import finite_maximum, shape_scores, update_softmax, visible_keys


@gluon.jit
def update_scaled(scores, scale, maximum, total):
    """`update_softmax` of scores * scale, for a scale that is not negative: one fused multiply-add for each weight."""
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale)
    stand_in = finite_maximum(new_maximum)
    weights = gl.exp2(scores * scale - stand_in[:, None])
    rescale = gl.exp2(maximum - stand_in)
    return weights, rescale, new_maximum, total * rescale + gl.sum(weights, 1)


@gluon.jit
def weigh(
    scores, scale, first_key, start, end, rows, rules, numbers, maximum, total, MASKED: gl.constexpr, CAUSAL: gl.constexpr
):  # fmt: skip
    """One step of the online softmax over raw scores [rows, keys], as `update_softmax` returns it.

    MASKED: some row may not see all keys of the tile. Masks come after the scale, which may be 0.
    """
    if MASKED or rules.softcap is not None or rules.alibi_slopes is not None:
        keys = first_key + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        scores = shape_scores(scores * scale, keys, rows, rules)
        if MASKED:
            visible = visible_keys(keys, (keys >= start) & (keys < end), rows, numbers, CAUSAL)
            scores = gl.where(visible, scores, float("-inf"))
        return update_softmax(scores, maximum, total)
    else:
        return update_scaled(scores, scale, maximum, total)
