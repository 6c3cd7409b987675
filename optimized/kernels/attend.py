"""The inner loop: one tile of rows over a range of keys, for each of the three ways a cache holds keys and values.

- attention: a row of keys and a row of values per kv head;
- absorbed MLA: one latent row that is key and value at once, and a rotary row beside it;
- decompressed MLA: the same rows, projected up to a query head's keys and values on the fly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOG2_E, inner_range, load_bias, load_rows, scale_of, shape_scores, update_softmax, visible_keys


@triton.jit
def load_blocks(requests, request, table_stride, keys, start, end, BLOCK_SIZE: tl.constexpr):
    """The block of each key; the table is read only for keys in [start, end)."""
    row = requests.block_table + request.to(tl.int64) * table_stride
    return tl.load(row + keys // BLOCK_SIZE, mask=(keys >= start) & (keys < end), other=0)


@triton.jit
def load_keys(pointer, place, stride_dim, readable, SIZE: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """[BLOCK, BLOCK_N] of cache rows, transposed, in the arithmetic's format."""
    dims = tl.arange(0, BLOCK)
    mask = (dims < SIZE)[:, None] & readable[None, :]
    loaded = tl.load(pointer + place[None, :] + (dims.to(tl.int64) * stride_dim)[:, None], mask=mask, other=0.0)
    return loaded.to(KIND)


@triton.jit
def load_values(pointer, place, stride_dim, readable, SIZE: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """[BLOCK_N, BLOCK] of cache rows in the arithmetic's format."""
    dims = tl.arange(0, BLOCK)
    mask = readable[:, None] & (dims < SIZE)[None, :]
    loaded = tl.load(pointer + place[:, None] + (dims.to(tl.int64) * stride_dim)[None, :], mask=mask, other=0.0)
    return loaded.to(KIND)


@triton.jit
def project_rows(
    cache, weights, weight_stride_row, weight_stride_column, place, readable,
    RANK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK] = latent rows [BLOCK_N, RANK] @ weights [SIZE, RANK]^T, summed in float32."""
    dims = tl.arange(0, BLOCK)
    projected = tl.zeros([BLOCK_N, BLOCK], tl.float32)
    for first in range(0, RANK, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        inside = columns < RANK
        latent_place = place[:, None] + (columns.to(tl.int64) * cache.key_stride_dim)[None, :]
        latent = tl.load(cache.k_cache + latent_place, mask=readable[:, None] & inside[None, :], other=0.0).to(KIND)
        weight_place = (dims.to(tl.int64) * weight_stride_row)[None, :]
        weight_place += (columns.to(tl.int64) * weight_stride_column)[:, None]
        weight = tl.load(weights + weight_place, mask=inside[:, None] & (dims < SIZE)[None, :], other=0.0).to(KIND)
        projected = tl.dot(latent, weight, projected, input_precision="ieee")
    return projected


@triton.jit
def raw_scores(
    q, q_rope, cache, scales, kv_head, block, slot, readable, softmax_scale,
    HEAD_SIZE: tl.constexpr, ROPE_SIZE: tl.constexpr, RANK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """(scores [BLOCK_M, BLOCK_N] times `softmax_scale`, keys [BLOCK_D, BLOCK_N]) of one tile of cache rows."""
    place = block * cache.key_stride_block + slot * cache.key_stride_slot
    k_scale = scale_of(scales.k, scales.k_stride, kv_head)
    scale = softmax_scale * scale_of(scales.q, scales.q_stride, kv_head)
    if cache.w_uk is not None:
        weights = cache.w_uk + tl.cast(kv_head, tl.int64) * cache.w_uk_stride_head
        projected = project_rows(
            cache, weights, cache.w_uk_stride_row, cache.w_uk_stride_column, place, readable,
            RANK, HEAD_SIZE, BLOCK_D, BLOCK_N, BLOCK_C, KIND,
        )  # fmt: skip
        # Scaled before it is rounded: the unscaled sum may not fit into float16.
        keys = tl.trans((projected * k_scale).to(KIND))
        scores = tl.dot(q, keys, input_precision="ieee")
        rope = load_keys(cache.rope, place, cache.key_stride_dim, readable, ROPE_SIZE, BLOCK_R, KIND)
        scores += k_scale * tl.dot(q_rope, rope, input_precision="ieee")
    else:
        head_place = place + tl.cast(kv_head, tl.int64) * cache.key_stride_head
        keys = load_keys(cache.k_cache, head_place, cache.key_stride_dim, readable, HEAD_SIZE, BLOCK_D, KIND)
        scores = tl.dot(q, keys, input_precision="ieee")
        if cache.rope is not None:
            rope = load_keys(cache.rope, place, cache.key_stride_dim, readable, ROPE_SIZE, BLOCK_R, KIND)
            scores = tl.dot(q_rope, rope, scores, input_precision="ieee")
        scale = scale * k_scale
    return scores * scale, keys


@triton.jit
def value_rows(
    cache, keys, scales, kv_head, block, slot, readable,
    HEAD_SIZE_V: tl.constexpr, RANK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The values [BLOCK_N, BLOCK_V] of the tile whose keys were just scored."""
    if cache.w_uv is not None:
        place = block * cache.key_stride_block + slot * cache.key_stride_slot
        weights = cache.w_uv + tl.cast(kv_head, tl.int64) * cache.w_uv_stride_head
        projected = project_rows(
            cache, weights, cache.w_uv_stride_row, cache.w_uv_stride_column, place, readable,
            RANK, HEAD_SIZE_V, BLOCK_V, BLOCK_N, BLOCK_C, KIND,
        )  # fmt: skip
        value_tile = (projected * scale_of(scales.k, scales.k_stride, kv_head)).to(KIND)
    elif cache.v_cache is None:
        value_tile = tl.trans(keys)
    else:
        place = block * cache.value_stride_block + slot * cache.value_stride_slot
        place += tl.cast(kv_head, tl.int64) * cache.value_stride_head
        value_tile = load_values(cache.v_cache, place, cache.value_stride_dim, readable, HEAD_SIZE_V, BLOCK_V, KIND)
    return value_tile


@triton.jit
def attend(
    queries, cache, requests, rules, scales, request, kv_head, rows, heads, positions, row_mask, context,
    first_position, last_position, start, end, table_stride, sliding_window, right_window, bias_width, bias_stride,
    CAUSAL: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_SIZE_V: tl.constexpr, ROPE_SIZE: tl.constexpr,
    RANK: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Attend from a tile of rows to the keys [start, end): (weighted values, maximum, total), not yet divided."""
    q = load_rows(queries.main, queries.stride_token, queries.stride_head, rows, heads, row_mask, HEAD_SIZE, BLOCK_D)
    q = q.to(KIND)
    q_rope = q
    if queries.rope is not None:
        q_rope = load_rows(
            queries.rope, queries.rope_stride_token, queries.rope_stride_head, rows, heads, row_mask, ROPE_SIZE, BLOCK_R
        ).to(KIND)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    inner_start, inner_end = inner_range(
        first_position, last_position, start, end, sliding_window, right_window, CAUSAL
    )  # fmt: skip
    softmax_scale = rules.softmax_scale
    if rules.softcap is None:
        softmax_scale = softmax_scale * LOG2_E
    first_key = (start // BLOCK_N) * BLOCK_N
    columns = tl.arange(0, BLOCK_N)
    # Blocks are looked up one tile ahead: keys and values can be asked for without waiting for the table first.
    next_blocks = load_blocks(requests, request, table_stride, first_key + columns, start, end, BLOCK_SIZE)
    for first in range(first_key, end, BLOCK_N):
        keys = first + columns
        block = next_blocks.to(tl.int64)
        slot = (keys % BLOCK_SIZE).to(tl.int64)
        next_blocks = load_blocks(requests, request, table_stride, keys + BLOCK_N, start, end, BLOCK_SIZE)
        readable = (keys >= start) & (keys < end)
        if rules.query_bias is not None:
            visible = visible_keys(keys, readable, positions, row_mask, sliding_window, right_window, CAUSAL)
            bias = load_bias(rules, rows, keys - context, visible, bias_width, bias_stride)
            visible = visible & (bias > float("-inf"))
            # A key that the bias hides from everybody is not read: it may hold NaN, on a page that may not exist.
            readable = readable & (tl.max(visible.to(tl.int32), 0) > 0)
        scores, key_tile = raw_scores(
            q, q_rope, cache, scales, kv_head, block, slot, readable, softmax_scale,
            HEAD_SIZE, ROPE_SIZE, RANK, BLOCK_D, BLOCK_R, BLOCK_N, BLOCK_C, KIND,
        )  # fmt: skip
        scores = shape_scores(scores, keys, positions, heads, row_mask, rules)
        if rules.query_bias is not None:
            scores = tl.where(visible, scores + bias * LOG2_E, float("-inf"))
        elif (first < inner_start) | (first + BLOCK_N > inner_end):
            visible = visible_keys(keys, readable, positions, row_mask, sliding_window, right_window, CAUSAL)
            scores = tl.where(visible, scores, float("-inf"))
        weights, rescale, maximum, total = update_softmax(scores, maximum, total)
        value_tile = value_rows(
            cache, key_tile, scales, kv_head, block, slot, readable,
            HEAD_SIZE_V, RANK, BLOCK_V, BLOCK_N, BLOCK_C, KIND,
        )  # fmt: skip
        values = values * rescale[:, None]
        values = tl.dot(weights.to(KIND), value_tile, values, input_precision="ieee")
    return values, maximum, total
