"""Device functions that every attention kernel shares: which rows and keys a program has, how a score is made,
the online softmax, and how a finished tile is written.

A tile's rows are (token, query head of one kv head) pairs, tokens outermost, so that any whole GQA ratio packs
without holes. Positions: token t of a request with n new tokens and L keys stands at p = L - n + t.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
FLOAT8_MAX = tl.constexpr(448.0)


@triton.jit
def request_span(requests, request):
    """(first row in the batch, new tokens, keys) of a request."""
    first_row = tl.load(requests.cu_seqlens_q + request)
    query_len = tl.load(requests.cu_seqlens_q + request + 1) - first_row
    seq_len = tl.maximum(tl.load(requests.seq_lens + request), 0)
    return first_row, query_len, seq_len


@triton.jit
def tile_rows(first_token, end_token, sub_tile, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Tokens within the request, heads within the group, and which rows exist, of the tile's `sub_tile`-th part."""
    flat = sub_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = first_token + flat // GROUP
    return tokens, flat % GROUP, tokens < end_token


@triton.jit
def key_range(first_position, last_position, seq_len, sliding_window, right_window, CAUSAL: tl.constexpr):
    """The keys [start, end) that some position of [first_position, last_position] may see.

    Neighbouring positions see overlapping or touching ranges, so the union has no holes, and no key in it is one
    that nobody may read (those that a query bias hides are dealt with in `transform_scores`).
    """
    start = 0
    end = seq_len
    if CAUSAL:
        end = tl.minimum(end, last_position + 1)
    elif right_window is not None:
        end = tl.minimum(end, last_position + right_window + 1)
    if sliding_window is not None:
        start = tl.maximum(first_position - sliding_window + 1, 0)
    return start, end


@triton.jit
def load_rows(pointer, stride_row, stride_head, rows, heads, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK_M, BLOCK] of a [rows, heads, size] tensor; rows outside of the mask are zero, never read."""
    dims = tl.arange(0, BLOCK)
    place = rows.to(tl.int64) * stride_row + heads.to(tl.int64) * stride_head
    return tl.load(pointer + place[:, None] + dims[None, :], mask=mask[:, None] & (dims < SIZE)[None, :], other=0.0)


@triton.jit
def scale_of(pointer, stride, kv_head):
    """A head's scale, or 1 where there is none."""
    if pointer is None:
        return 1.0
    else:
        return tl.load(pointer + kv_head * stride)


@triton.jit
def transform_scores(
    scores,
    keys,
    readable,
    positions,
    rows,
    heads,
    row_mask,
    context,
    rules,
    sliding_window,
    right_window,
    bias_width,
    bias_stride,
    CAUSAL: tl.constexpr,
):
    """Softcap, ALiBi, query bias and visibility; invisible scores become -inf. Returns (scores, visible)."""
    if rules.softcap is not None:
        # c * tanh(s / c) as c * (1 - 2 / (exp(2 s / c) + 1)), which no large score can overflow.
        grown = tl.exp2(scores * rules.two_over_softcap * LOG2_E)
        scores = rules.softcap * (1.0 - 2.0 / (grown + 1.0))
    distance = keys[None, :] - positions[:, None]
    if rules.alibi_slopes is not None:
        slopes = tl.load(rules.alibi_slopes + heads, mask=row_mask, other=0.0)
        scores += slopes[:, None] * distance.to(tl.float32)
    visible = readable[None, :] & row_mask[:, None]
    if CAUSAL:
        visible = visible & (distance <= 0)
    elif right_window is not None:
        visible = visible & (distance <= right_window)
    if sliding_window is not None:
        visible = visible & (distance > -sliding_window)
    if rules.query_bias is not None:
        new_keys = keys - context
        biased = visible & ((new_keys >= 0) & (new_keys < bias_width))[None, :]
        place = rows.to(tl.int64)[:, None] * bias_stride + new_keys[None, :]
        bias = tl.load(rules.query_bias + place, mask=biased, other=0.0)
        scores += bias
        visible = visible & (bias > float("-inf"))
    return tl.where(visible, scores, float("-inf")), visible


@triton.jit
def update_softmax(scores, maximum, total):
    """One step of the online softmax: (weights, factor for what was summed before, new maximum, new total)."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen no key yet has the maximum -inf; any finite stand-in makes its weights 0.
    stand_in = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2((scores - stand_in[:, None]) * LOG2_E)
    rescale = tl.exp2((maximum - stand_in) * LOG2_E)
    return weights, rescale, new_maximum, total * rescale + tl.sum(weights, 1)


@triton.jit
def join_sink(maximum, total, sink):
    """Let the sink's logit into the denominator: (factor for the values, maximum, total)."""
    new_maximum = tl.maximum(maximum, sink)
    stand_in = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    rescale = tl.exp2((maximum - stand_in) * LOG2_E)
    # The difference of equal infinities is NaN, and equal means a weight of 1, except -inf, which means none.
    weight = tl.exp2(tl.where(sink == stand_in, 0.0, sink - stand_in) * LOG2_E)
    return rescale, new_maximum, total * rescale + weight


@triton.jit
def log_sum(maximum, total):
    return tl.where(total > 0.0, maximum + tl.log(total), float("-inf"))


@triton.jit
def store_out(outputs, scales, out, rows, heads, kv_head, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Scale the finished rows to the output's format and write them."""
    if scales.v is not None:
        out = out * tl.load(scales.v + kv_head * scales.v_stride)
    if outputs.out.dtype.element_ty == tl.float8e4nv:
        if scales.out is not None:
            out = tl.div_rn(out, tl.load(scales.out + kv_head * scales.out_stride))
        out = tl.minimum(tl.maximum(out, -FLOAT8_MAX), FLOAT8_MAX)
    dims = tl.arange(0, BLOCK)
    place = rows.to(tl.int64) * outputs.stride_token + heads.to(tl.int64) * outputs.stride_head
    pointers = outputs.out + place[:, None] + dims[None, :]
    tl.store(pointers, out.to(outputs.out.dtype.element_ty), mask=mask[:, None] & (dims < SIZE)[None, :])


@triton.jit
def store_lse(outputs, lse, rows, heads, mask):
    place = rows.to(tl.int64) * outputs.lse_stride_token + heads.to(tl.int64) * outputs.lse_stride_head
    tl.store(outputs.lse + place, lse, mask=mask)


@triton.jit
def finish(values, maximum, total, rules, heads, row_mask):
    """Sink, division, logarithm: (out, lse) of a tile that has seen all its keys."""
    if rules.sinks is not None:
        sinks = tl.load(rules.sinks + heads, mask=row_mask, other=float("-inf"))
        rescale, maximum, total = join_sink(maximum, total, sinks)
        values = values * rescale[:, None]
    # Nothing visible and no sink: total is 0 and so are the values.
    out = values / tl.where(total > 0.0, total, 1.0)[:, None]
    return out, log_sum(maximum, total)
