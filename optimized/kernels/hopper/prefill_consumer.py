"""A warp group that attends: the softmax of a tile runs while the tensor cores multiply the weights of the tile before.

Two of them share the tiles that the producer brings, each with its own rows.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..tiles import LOG2_E, inner_range
from .layouts import product_layout, weights_layout
from .prefill_groups import Carried, Place
from .prefill_rows import await_queries, copy_queries, rows_of, store_rows
from .prefill_schedule import advance, key_tiles, no_work, num_works, work_of
from .prefill_softmax import row_limits, weigh


@gluon.jit
def multiply_values(carried, tensors, barriers, v):
    """Begin adding the carried weights times the tile of values they belong to."""
    weighted = carried.weighted
    rescale = gl.convert_layout(carried.rescale, gl.SliceLayout(1, weighted.type.layout))
    weighted = weighted * rescale[:, None]
    mbarrier.wait(barriers.v_full.index(v.stage), v.phase)
    return warpgroup_mma(carried.weights, tensors.v.index(v.stage), weighted, is_async=True)


@gluon.jit
def next_tile(
    tile, last, softmax_scale, rows, limits, rules, carried, places, tensors, barriers,
    MASKED: gl.constexpr, WINDOW: gl.constexpr, WHICH: gl.constexpr, SIZES: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Scores of this tile and values of the last one are in the tensor cores together; the softmax hides the second."""
    k, v = places
    zero = gl.full([TILE.rows, TILE.keys], 0.0, gl.float32, product_layout(TILE.keys))
    query = tensors.q.index(WHICH)
    scores = warpgroup_mma(query, tensors.k.index(k.stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    weighted = multiply_values(carried, tensors, barriers, v)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(barriers.k_empty.index(k.stage), count=1)
    k = advance(k, TILE.stages)
    new_weights, rescale, maximum, total = weigh(
        scores, softmax_scale, tile * TILE.keys, limits, rows, rules, carried.maximum, carried.total, MASKED, WINDOW
    )  # fmt: skip
    weights = carried.weights
    new_weights = gl.convert_layout(new_weights.to(weights.dtype), weights.type.layout)
    # Here, not where the next tile begins: the assembler moves arithmetic across the wait below, but not across a loop.
    mbarrier.wait(barriers.k_full.index(k.stage), k.phase, pred=tile + 1 < last)
    # The weights in flight are an operand until here: named, so that their registers are not used again before.
    weighted, _ = warpgroup_mma_wait(0, deps=[weighted, weights])
    mbarrier.arrive(barriers.v_empty.index(v.stage), count=1)
    v = advance(v, TILE.stages)
    carried = Carried(weights=new_weights, rescale=rescale, maximum=maximum, total=total, weighted=weighted)
    return carried, (k, v)


@gluon.jit
def first_tile(
    tile, last, softmax_scale, rows, limits, rules, k, tensors, barriers,
    WINDOW: gl.constexpr, WHICH: gl.constexpr, SIZES: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Scores of the first tile, which has no values to multiply meanwhile."""
    LAYOUT: gl.constexpr = product_layout(TILE.keys)
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    OUT_LAYOUT: gl.constexpr = product_layout(SIZES.padded_value)
    mbarrier.wait(barriers.k_full.index(k.stage), k.phase)
    zero = gl.full([TILE.rows, TILE.keys], 0.0, gl.float32, LAYOUT)
    query = tensors.q.index(WHICH)
    scores = warpgroup_mma(query, tensors.k.index(k.stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(barriers.k_empty.index(k.stage), count=1)
    k = advance(k, TILE.stages)
    weights, rescale, maximum, total = weigh(
        scores, softmax_scale, tile * TILE.keys, limits, rows, rules,
        gl.full([TILE.rows], float("-inf"), gl.float32, ROW), gl.full([TILE.rows], 0.0, gl.float32, ROW), True, WINDOW,
    )  # fmt: skip
    weights = gl.convert_layout(weights.to(SIZES.arithmetic), weights_layout(SIZES.padded_value))
    mbarrier.wait(barriers.k_full.index(k.stage), k.phase, pred=tile + 1 < last)
    weighted = gl.full([TILE.rows, SIZES.padded_value], 0.0, gl.float32, OUT_LAYOUT)
    return Carried(weights=weights, rescale=rescale, maximum=maximum, total=total, weighted=weighted), k


@gluon.jit
def begin(step, numbers, turn, works, tensors, WHICH: gl.constexpr, SIZES: gl.constexpr, TILE: gl.constexpr):
    """Look up the work of a turn, and ask for its queries: nobody may be reading those of the turn before any more."""
    work, start, end = work_of(step, numbers, turn, works, SIZES, TILE)
    if work.is_live:
        copy_queries(tensors.q.index(WHICH), step.queries, work, WHICH, SIZES, TILE)
    return work, start, end


@gluon.jit
def attend_rows(
    begun, turn, works, step, numbers, places, tensors, barriers,
    WHICH: gl.constexpr, SIZES: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """All keys of the consumer's rows, and the answer written.

    Returns where the rings are after that, and the work of the next turn, which begins on the way.
    """
    KEYS: gl.constexpr = TILE.keys
    WINDOW: gl.constexpr = numbers.sliding_window is not None
    work, start, end = begun
    rules = step.rules
    softmax_scale = rules.softmax_scale
    if rules.softcap is None:
        softmax_scale = softmax_scale * LOG2_E
    rows = rows_of(work, WHICH, gl.SliceLayout(1, product_layout(KEYS)), SIZES, TILE)
    first, last = key_tiles(start, end, KEYS)
    limits = row_limits(rows, numbers, start, end, SIZES.causal)
    inner_start, inner_end = inner_range(rows, numbers, start, end, SIZES.causal)
    k, v = places
    carried, k = first_tile(
        first, last, softmax_scale, rows, limits, rules, k, tensors, barriers, WINDOW, WHICH, SIZES, TILE
    )  # fmt: skip
    places = (k, v)
    # Tiles that every row sees whole lie in [left, right).
    left = first + 1
    if WINDOW:
        left = gl.minimum(gl.maximum((inner_start + KEYS - 1) // KEYS, first + 1), last)
        for tile in range(first + 1, left):
            carried, places = next_tile(
                tile, last, softmax_scale, rows, limits, rules, carried, places, tensors, barriers,
                True, WINDOW, WHICH, SIZES, TILE,
            )  # fmt: skip
    right = gl.minimum(gl.maximum(inner_end // KEYS, left), last)
    for tile in range(left, right):
        carried, places = next_tile(
            tile, last, softmax_scale, rows, limits, rules, carried, places, tensors, barriers,
            False, WINDOW, WHICH, SIZES, TILE,
        )  # fmt: skip
    for tile in range(right, last):
        carried, places = next_tile(
            tile, last, softmax_scale, rows, limits, rules, carried, places, tensors, barriers,
            True, WINDOW, WHICH, SIZES, TILE,
        )  # fmt: skip
    k, v = places
    weighted = multiply_values(carried, tensors, barriers, v)
    # All warps are done with this turn's queries, as with the last keys, of which the producer has been told.
    following = begin(step, numbers, turn + 1, works, tensors, WHICH, SIZES, TILE)
    weighted, _ = warpgroup_mma_wait(0, deps=[weighted, carried.weights])
    mbarrier.arrive(barriers.v_empty.index(v.stage), count=1)
    store_rows(step, rows.rows, rows.kv_head, carried.maximum, carried.total, weighted, SIZES)
    return (k, advance(v, TILE.stages)), following


@gluon.jit
def consume(
    step, numbers, tensors, barriers, WHICH: gl.constexpr, SIZES: gl.constexpr, TILE: gl.constexpr
):  # fmt: skip
    """Attend from the `WHICH`-th half of the rows of all work that the program has."""
    first = Place(stage=gl.to_tensor(0), phase=gl.to_tensor(0))
    places = (first, first)
    works = num_works(step.work, SIZES, TILE)
    begun = no_work()
    for turn in range(-1, (works + gl.num_programs(0) - 1) // gl.num_programs(0)):
        if begun[0].is_live:
            await_queries()
            places, begun = attend_rows(
                begun, turn, works, step, numbers, places, tensors, barriers, WHICH, SIZES, TILE
            )  # fmt: skip
        else:
            begun = begin(step, numbers, turn + 1, works, tensors, WHICH, SIZES, TILE)
