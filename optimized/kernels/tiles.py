"""Device functions that every attention kernel shares: which rows and keys a program has, how a score is made,
the online softmax, and how a finished tile is written.

A tile's rows are (token, query head of one kv head) pairs, tokens outermost, so that any whole GQA ratio packs
without holes. Positions: token t of a request with n new tokens and L keys stands at p = L - n + t.

Scores, running maxima and sinks are kept in base-2 logarithms, so that a weight is one exp2 of a difference: the
factor log2(e) is part of the softmax scale and costs nothing. lse goes back to natural units when it is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .groups import QueryTile, Rows

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FLOAT8_MAX = tl.constexpr(448.0)


@triton.jit
def query_tile(
    span, request, kv_head, first_token, end_token, sub_tile, SIZES: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The `sub_tile`-th TILE.rows of a request's tokens [first_token, end_token) and a kv head's query heads."""
    context = span.seq_len - span.query_len
    flat = sub_tile * TILE.rows + tl.arange(0, TILE.rows)
    tokens = first_token + flat // SIZES.group
    heads = kv_head * SIZES.group + flat % SIZES.group
    first_position = context + first_token + sub_tile * TILE.rows // SIZES.group
    last_token = tl.minimum(first_token + (sub_tile * TILE.rows + TILE.rows - 1) // SIZES.group, end_token - 1)
    return QueryTile(
        request=request,
        kv_head=kv_head,
        rows=Rows(tokens=span.first_row + tokens, heads=heads, mask=tokens < end_token),
        tokens=tokens,
        positions=context + tokens,
        context=context,
        first_position=first_position,
        last_position=context + last_token,
    )


@triton.jit
def key_range(tile, span, numbers, CAUSAL: tl.constexpr):
    """The keys [start, end) that some row of the tile may see.

    Neighbouring positions see overlapping or touching ranges, so the union has no holes, and no key in it is one
    that nobody may read, but for those that a query bias hides (`attend` leaves them out tile by tile).
    """
    start = 0
    end = span.seq_len
    if CAUSAL:
        end = tl.minimum(end, tile.last_position + 1)
    elif numbers.right_window is not None:
        end = tl.minimum(end, tile.last_position + numbers.right_window + 1)
    if numbers.sliding_window is not None:
        start = tl.maximum(tile.first_position - numbers.sliding_window + 1, 0)
    return start, end


@triton.jit
def inner_range(tile, numbers, start, end, CAUSAL: tl.constexpr):
    """The part of the keys [start, end) that every row of the tile sees."""
    if CAUSAL:
        end = tl.minimum(end, tile.first_position + 1)
    elif numbers.right_window is not None:
        end = tl.minimum(end, tile.first_position + numbers.right_window + 1)
    if numbers.sliding_window is not None:
        start = tl.maximum(tile.last_position - numbers.sliding_window + 1, start)
    return start, end


@triton.jit
def load_rows(pointer, stride_token, stride_head, rows, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED] of a [num_tokens, num_query_heads, SIZE] tensor; what the mask leaves out is zero, never read."""
    dims = tl.arange(0, PADDED)
    place = rows.tokens.to(tl.int64) * stride_token + rows.heads.to(tl.int64) * stride_head
    mask = rows.mask[:, None] & (dims < SIZE)[None, :]
    return tl.load(pointer + place[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def scale_of(scale, kv_head):
    """A head's scale, or 1 where there is none."""
    if scale.base is None:
        return 1.0
    else:
        return tl.load(scale.base + kv_head * scale.stride_head)


@triton.jit
def visible_keys(keys, readable, tile, numbers, CAUSAL: tl.constexpr):
    """[TILE.rows, TILE.keys]: which row sees which key, before any query bias."""
    distance = keys[None, :] - tile.positions[:, None]
    visible = readable[None, :] & tile.rows.mask[:, None]
    if CAUSAL:
        visible = visible & (distance <= 0)
    elif numbers.right_window is not None:
        visible = visible & (distance <= numbers.right_window)
    if numbers.sliding_window is not None:
        visible = visible & (distance > -numbers.sliding_window)
    return visible


@triton.jit
def load_bias(rules, numbers, rows, new_keys, visible):
    """The query bias [TILE.rows, TILE.keys] of keys numbered from the request's first new one; 0 beyond its width."""
    mask = visible & ((new_keys >= 0) & (new_keys < numbers.bias_width))[None, :]
    place = rows.tokens.to(tl.int64)[:, None] * numbers.bias_stride + new_keys[None, :]
    return tl.load(rules.query_bias + place, mask=mask, other=0.0)


@triton.jit
def tanh(x):
    """To a relative error of 28 units of 2^-24 anywhere, so that a large softcap costs no accuracy.

    From a quarter on by 1 - 2 / (exp(2|x|) + 1), which no large |x| can overflow but which cancels for a small one;
    below by the series x - x^3/3 + 2x^5/15 - 17x^7/315 + 62x^9/2835, whose next term is under 2^-26 of x there.
    """
    size = tl.abs(x)
    by_exp = 1.0 - 2.0 / (tl.exp2(2.0 * size * LOG2_E) + 1.0)
    square = x * x
    series = 1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    return tl.where(size < 0.25, x * series, tl.where(x < 0.0, -by_exp, by_exp))


@triton.jit
def shape_scores(scores, keys, tile, rules):
    """Softcap, then ALiBi. With a softcap, scores come in natural units; in any case they leave in base 2."""
    if rules.softcap is not None:
        scores = (rules.softcap * LOG2_E) * tanh(scores * rules.one_over_softcap)
    if rules.alibi_slopes is not None:
        slopes = tl.load(rules.alibi_slopes + tile.rows.heads, mask=tile.rows.mask, other=0.0) * LOG2_E
        distance = keys[None, :] - tile.positions[:, None]
        scores += slopes[:, None] * distance.to(tl.float32)
    return scores


@triton.jit
def finite_maximum(maximum):
    """A running maximum that may be subtracted: for -inf, nothing seen yet, any number makes all weights 0."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def distance_from(logit, maximum):
    """logit - maximum with the infinities meant: -inf stays, +inf is 0 from itself."""
    stand_in = finite_maximum(maximum)
    return tl.where(logit == stand_in, 0.0, logit - stand_in)


@triton.jit
def update_softmax(scores, maximum, total):
    """One step of the online softmax: (weights, factor for what was summed before, new maximum, new total)."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    stand_in = finite_maximum(new_maximum)
    weights = tl.exp2(scores - stand_in[:, None])
    rescale = tl.exp2(maximum - stand_in)
    return weights, rescale, new_maximum, total * rescale + tl.sum(weights, 1)


@triton.jit
def join_sink(maximum, total, sink):
    """Let the sink's logit, in natural units, into the denominator: (factor for the values, maximum, total)."""
    sink = sink * LOG2_E
    new_maximum = tl.maximum(maximum, sink)
    rescale = tl.exp2(maximum - finite_maximum(new_maximum))
    return rescale, new_maximum, total * rescale + tl.exp2(distance_from(sink, new_maximum))


@triton.jit
def log_sum(maximum, total):
    """log(exp(maximum) * total), all in natural units; -inf where there is nothing."""
    # A NaN is no empty row: it must not pass for one in a merge.
    return tl.where(total == 0.0, float("-inf"), maximum + tl.log(total))


@triton.jit
def saturate(x):
    """Into the range of float8_e4m3fn. By comparisons, which a NaN passes: the hardware's min and max would drop it."""
    return tl.where(x > FLOAT8_MAX, FLOAT8_MAX, tl.where(x < -FLOAT8_MAX, -FLOAT8_MAX, x))


@triton.jit
def store_out(outputs, scales, out, rows, kv_head, SIZES: tl.constexpr):
    """Scale the finished rows to the output's format and write them."""
    if scales.v.base is not None:
        out = out * scale_of(scales.v, kv_head)
    if outputs.out.dtype.element_ty == tl.float8e4nv:
        if scales.out.base is not None:
            out = tl.div_rn(out, scale_of(scales.out, kv_head))
        out = saturate(out)
    dims = tl.arange(0, SIZES.padded_value)
    place = rows.tokens.to(tl.int64) * outputs.stride_token + rows.heads.to(tl.int64) * outputs.stride_head
    pointers = outputs.out + place[:, None] + dims[None, :]
    mask = rows.mask[:, None] & (dims < SIZES.head_size_v)[None, :]
    tl.store(pointers, out.to(outputs.out.dtype.element_ty), mask=mask)


@triton.jit
def store_lse(outputs, lse, rows):
    place = rows.tokens.to(tl.int64) * outputs.lse_stride_token + rows.heads.to(tl.int64) * outputs.lse_stride_head
    tl.store(outputs.lse + place, lse, mask=rows.mask)


@triton.jit
def finish(state, rules, rows):
    """Sink, division, logarithm: (out, lse) of a tile that has seen all its keys."""
    maximum, total, weighted = state.maximum, state.total, state.weighted
    if rules.sinks is not None:
        sinks = tl.load(rules.sinks + rows.heads, mask=rows.mask, other=float("-inf"))
        rescale, maximum, total = join_sink(maximum, total, sinks)
        weighted = weighted * rescale[:, None]
    # Nothing visible and no sink: total is 0 and so is the sum.
    out = weighted / tl.where(total > 0.0, total, 1.0)[:, None]
    return out, log_sum(maximum * LN_2, total)
