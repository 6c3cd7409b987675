"""The inner loop: one tile of rows over a range of keys, for each of the three ways a cache holds keys and values.

- attention: a row of keys and a row of values per kv head;
- absorbed MLA: one latent row that is key and value at once, and a rotary row beside it;
- decompressed MLA: the same rows, projected up to a query head's keys and values on the fly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .groups import KeyTile, Query, State
from .tiles import LOG2_E, inner_range, load_bias, load_rows, scale_of, shape_scores, update_softmax, visible_keys


@triton.jit
def load_blocks(requests, numbers, request, keys, start, end, SIZES: tl.constexpr):
    """The block of each key; the table is read only for keys in [start, end)."""
    row = requests.block_table + request.to(tl.int64) * numbers.table_stride
    return tl.load(row + keys // SIZES.block_size, mask=(keys >= start) & (keys < end), other=0)


@triton.jit
def load_keys(pointer, place, stride_dim, readable, SIZE: tl.constexpr, PADDED: tl.constexpr, KIND: tl.constexpr):
    """[PADDED, TILE.keys] of cache rows, transposed, in the arithmetic's format."""
    dims = tl.arange(0, PADDED)
    mask = (dims < SIZE)[:, None] & readable[None, :]
    loaded = tl.load(pointer + place[None, :] + (dims.to(tl.int64) * stride_dim)[:, None], mask=mask, other=0.0)
    return loaded.to(KIND)


@triton.jit
def load_values(pages, place, readable, SIZES: tl.constexpr):
    """[TILE.keys, padded_value] of cache rows in the arithmetic's format."""
    dims = tl.arange(0, SIZES.padded_value)
    mask = readable[:, None] & (dims < SIZES.head_size_v)[None, :]
    loaded = tl.load(
        pages.base + place[:, None] + (dims.to(tl.int64) * pages.stride_dim)[None, :], mask=mask, other=0.0
    )
    return loaded.to(SIZES.arithmetic)


@triton.jit
def place_of(pages, key_tile):
    """Where the rows of the first head begin: [TILE.keys]."""
    return key_tile.block * pages.stride_block + key_tile.slot * pages.stride_slot


@triton.jit
def project_rows(latent, weights, head, key_tile, SIZE: tl.constexpr, PADDED: tl.constexpr, SIZES: tl.constexpr):
    """[TILE.keys, PADDED] = latent rows [TILE.keys, rank] @ the head's weights [SIZE, rank]^T, summed in float32."""
    KEYS: tl.constexpr = key_tile.keys.shape[0]
    dims = tl.arange(0, PADDED)
    place = place_of(latent, key_tile)
    head_weights = weights.base + tl.cast(head, tl.int64) * weights.stride_head
    projected = tl.zeros([KEYS, PADDED], tl.float32)
    for first in range(0, SIZES.rank, SIZES.rank_step):
        columns = first + tl.arange(0, SIZES.rank_step)
        inside = columns < SIZES.rank
        row_place = place[:, None] + (columns.to(tl.int64) * latent.stride_dim)[None, :]
        rows = tl.load(latent.base + row_place, mask=key_tile.readable[:, None] & inside[None, :], other=0.0)
        weight_place = (dims.to(tl.int64) * weights.stride_row)[None, :]
        weight_place += (columns.to(tl.int64) * weights.stride_column)[:, None]
        weight = tl.load(head_weights + weight_place, mask=inside[:, None] & (dims < SIZE)[None, :], other=0.0)
        rows, weight = rows.to(SIZES.arithmetic), weight.to(SIZES.arithmetic)
        projected = tl.dot(rows, weight, projected, input_precision="ieee")
    return projected


@triton.jit
def raw_scores(query, cache, scales, kv_head, key_tile, softmax_scale, SIZES: tl.constexpr):
    """(scores [TILE.rows, TILE.keys] times `softmax_scale`, keys [padded_head, TILE.keys]) of one tile of keys."""
    KIND: tl.constexpr = SIZES.arithmetic
    place = place_of(cache.k, key_tile)
    readable = key_tile.readable
    k_scale = scale_of(scales.k, kv_head)
    scale = softmax_scale * scale_of(scales.q, kv_head)
    if cache.w_uk is not None:
        projected = project_rows(cache.k, cache.w_uk, kv_head, key_tile, SIZES.head_size, SIZES.padded_head, SIZES)
        # Scaled before it is rounded: the unscaled sum may not fit into float16.
        keys = tl.trans((projected * k_scale).to(KIND))
        scores = tl.dot(query.main, keys, input_precision="ieee")
        rope = load_keys(cache.rope, place, cache.k.stride_dim, readable, SIZES.rope_size, SIZES.padded_rope, KIND)
        scores += k_scale * tl.dot(query.rope, rope, input_precision="ieee")
    else:
        head_place = place + tl.cast(kv_head, tl.int64) * cache.k.stride_head
        keys = load_keys(
            cache.k.base, head_place, cache.k.stride_dim, readable, SIZES.head_size, SIZES.padded_head, KIND
        )
        scores = tl.dot(query.main, keys, input_precision="ieee")
        if cache.rope is not None:
            rope = load_keys(cache.rope, place, cache.k.stride_dim, readable, SIZES.rope_size, SIZES.padded_rope, KIND)
            scores = tl.dot(query.rope, rope, scores, input_precision="ieee")
        scale = scale * k_scale
    return scores * scale, keys


@triton.jit
def value_rows(cache, keys, scales, kv_head, key_tile, SIZES: tl.constexpr):
    """The values [TILE.keys, padded_value] of the tile whose keys were just scored."""
    if cache.w_uv is not None:
        projected = project_rows(cache.k, cache.w_uv, kv_head, key_tile, SIZES.head_size_v, SIZES.padded_value, SIZES)
        value_tile = (projected * scale_of(scales.k, kv_head)).to(SIZES.arithmetic)
    elif cache.v is None:
        value_tile = tl.trans(keys)
    else:
        place = place_of(cache.v, key_tile)
        place += tl.cast(kv_head, tl.int64) * cache.v.stride_head
        value_tile = load_values(cache.v, place, key_tile.readable, SIZES)
    return value_tile


@triton.jit
def load_query(queries, rows, SIZES: tl.constexpr):
    """The tile's rows of q, and of its rotary part where there is one, in the arithmetic's format."""
    KIND: tl.constexpr = SIZES.arithmetic
    main = load_rows(
        queries.main, queries.stride_token, queries.stride_head, rows, SIZES.head_size, SIZES.padded_head
    ).to(KIND)
    rope = main
    if queries.rope is not None:
        rope = load_rows(
            queries.rope, queries.rope_stride_token, queries.rope_stride_head, rows, SIZES.rope_size, SIZES.padded_rope
        ).to(KIND)
    return Query(main=main, rope=rope)


@triton.jit
def attend(step, numbers, tile, start, end, SIZES: tl.constexpr, TILE: tl.constexpr):
    """Attend from a tile of rows to the keys [start, end)."""
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_N: tl.constexpr = TILE.keys
    BLOCK_V: tl.constexpr = SIZES.padded_value
    rules = step.rules
    query = load_query(step.queries, tile.rows, SIZES)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    inner_start, inner_end = inner_range(tile, numbers, start, end, SIZES.causal)
    softmax_scale = rules.softmax_scale
    if rules.softcap is None:
        softmax_scale = softmax_scale * LOG2_E
    first_key = (start // BLOCK_N) * BLOCK_N
    columns = tl.arange(0, BLOCK_N)
    # Blocks are looked up one tile ahead: keys and values can be asked for without waiting for the table first.
    next_blocks = load_blocks(step.requests, numbers, tile.request, first_key + columns, start, end, SIZES)
    for first in range(first_key, end, BLOCK_N):
        keys = first + columns
        block = next_blocks.to(tl.int64)
        slot = (keys % SIZES.block_size).to(tl.int64)
        next_blocks = load_blocks(step.requests, numbers, tile.request, keys + BLOCK_N, start, end, SIZES)
        readable = (keys >= start) & (keys < end)
        if rules.query_bias is not None:
            visible = visible_keys(keys, readable, tile, numbers, SIZES.causal)
            bias = load_bias(rules, numbers, tile.rows, keys - tile.context, visible)
            visible = visible & (bias > float("-inf"))
            # A key that the bias hides from everybody is not read: it may hold NaN, on a page that may not exist.
            readable = readable & (tl.max(visible.to(tl.int32), 0) > 0)
        key_tile = KeyTile(keys=keys, block=block, slot=slot, readable=readable)
        scores, key_rows = raw_scores(query, step.cache, step.scales, tile.kv_head, key_tile, softmax_scale, SIZES)
        scores = shape_scores(scores, keys, tile, rules)
        if rules.query_bias is not None:
            scores = tl.where(visible, scores + bias * LOG2_E, float("-inf"))
        elif (first < inner_start) | (first + BLOCK_N > inner_end):
            visible = visible_keys(keys, readable, tile, numbers, SIZES.causal)
            scores = tl.where(visible, scores, float("-inf"))
        weights, rescale, maximum, total = update_softmax(scores, maximum, total)
        values = value_rows(step.cache, key_rows, step.scales, tile.kv_head, key_tile, SIZES)
        weighted = weighted * rescale[:, None]
        weighted = tl.dot(weights.to(SIZES.arithmetic), values, weighted, input_precision="ieee")
    return State(maximum=maximum, total=total, weighted=weighted)
