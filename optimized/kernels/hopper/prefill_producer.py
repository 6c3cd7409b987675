"""The warp that brings keys and values: a page's slots at a time, straight into swizzled shared memory.

A copy takes whole boxes of slots. Those of them that no row of the request may see can hold anything: keys are masked
after their product, values would turn a weight of zero into NaN and are cleared.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .layouts import CHUNK, SWIZZLE_ROWS, swizzled
from .prefill_groups import Place
from .prefill_schedule import advance, key_tiles, num_works, work_of


@gluon.jit
def look_up(tile, table_row, start, end, absent, SIZES: gl.constexpr, TILE: gl.constexpr):
    """The block of each box of a tile, all asked for at once; a box without keys in [start, end) gets `absent`."""
    BOXES: gl.constexpr = TILE.keys // TILE.box_slots
    blocks = ()
    for box in gl.static_range(BOXES):
        first = tile * TILE.keys + box * TILE.box_slots
        wanted = (first < end) & (first + TILE.box_slots > start)
        blocks += (gl.load(table_row + first // SIZES.block_size, mask=wanted, other=absent),)  # type: ignore[assignment]
    return blocks


@gluon.jit
def copy_tile(descriptor, ring, barrier, stage, tile, kv_head, blocks, SIZES: gl.constexpr, TILE: gl.constexpr):
    """Ask for one tile of keys or values. A block that does not exist comes as zeros, and so do columns too many."""
    BOXES: gl.constexpr = TILE.keys // TILE.box_slots
    COLUMN_BOXES: gl.constexpr = ring.shape[2] // CHUNK
    LAYOUT: gl.constexpr = swizzled(2)
    BOX_LAYOUT: gl.constexpr = swizzled(4)
    places = ring._reinterpret(ring.dtype, [TILE.stages * COLUMN_BOXES * BOXES, TILE.box_slots, CHUNK], LAYOUT)
    mbarrier.expect(barrier, TILE.keys * ring.shape[2] * 2)
    for box in gl.static_range(BOXES):
        slot = (tile * TILE.keys + box * TILE.box_slots) % SIZES.block_size
        for columns in gl.static_range(COLUMN_BOXES):
            place = places.index((stage * COLUMN_BOXES + columns) * BOXES + box)
            place = place._reinterpret(ring.dtype, [1, TILE.box_slots, 1, CHUNK], BOX_LAYOUT)
            source = [blocks[box], slot, kv_head, columns * CHUNK]
            tma.async_copy_global_to_shared(descriptor, source, barrier, place)


@gluon.jit
def clear_rows(ring, stage, first, last, keep_from, keep_to, TILE: gl.constexpr):
    """Zero those of a tile's rows [first, last) that lie outside of [keep_from, keep_to)."""
    COLUMN_BOXES: gl.constexpr = ring.shape[2] // CHUNK
    ATOMS: gl.constexpr = TILE.keys // SWIZZLE_ROWS
    LAYOUT: gl.constexpr = swizzled(2)
    REGISTERS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    rows = gl.arange(0, SWIZZLE_ROWS, gl.SliceLayout(1, REGISTERS))
    places = ring._reinterpret(ring.dtype, [TILE.stages * COLUMN_BOXES * ATOMS, SWIZZLE_ROWS, CHUNK], LAYOUT)
    for atom in range(first // SWIZZLE_ROWS, (last + SWIZZLE_ROWS - 1) // SWIZZLE_ROWS):
        keys = atom * SWIZZLE_ROWS + rows
        keep = (keys >= keep_from) & (keys < keep_to)
        for columns in gl.static_range(COLUMN_BOXES):
            place = places.index((stage * COLUMN_BOXES + columns) * ATOMS + atom)
            found = place.load(REGISTERS)
            place.store(gl.where(keep[:, None], found, 0.0).to(found.dtype))


@gluon.jit
def clear_hidden(ring, stage, work, tile, TILE: gl.constexpr):
    """Zero the slots of a tile of values that no row of the request sees: they came because their box has others."""
    BOX: gl.constexpr = TILE.box_slots
    first = work.first_readable - tile * TILE.keys
    last = work.end_readable - tile * TILE.keys
    if first > 0:
        clear_rows(ring, stage, first // BOX * BOX, first, first, TILE.keys, TILE)
    if last < TILE.keys:
        clear_rows(ring, stage, last, (last + BOX - 1) // BOX * BOX, 0, last, TILE)
    fence_async_shared()


@gluon.jit
def copy_values(descriptor, ring, barriers, v, cleaned, tile, work, blocks, SIZES: gl.constexpr, TILE: gl.constexpr):
    """Ask for one tile of values, and hand it on when it is clean; returns how many were cleaned so far, modulo 2."""
    first_key = tile * TILE.keys
    BOX: gl.constexpr = TILE.box_slots
    # Boxes begin at multiples of their size, so only an end that lies within one brings hidden slots along.
    cut_left = (work.first_readable > first_key) & (work.first_readable % BOX != 0)
    cut_right = (work.end_readable < first_key + TILE.keys) & (work.end_readable % BOX != 0)
    is_cut = cut_left | cut_right
    # Such a tile arrives at a barrier of its own.
    barrier = barriers.v_full.index(gl.where(is_cut, TILE.stages, v.stage))
    copy_tile(descriptor, ring, barrier, v.stage, tile, work.kv_head, blocks, SIZES, TILE)
    if is_cut:
        mbarrier.wait(barrier, cleaned)
        cleaned ^= 1
        clear_hidden(ring, v.stage, work, tile, TILE)
        mbarrier.arrive(barriers.v_full.index(v.stage), count=1)
    return cleaned


@gluon.jit
def produce(k_desc, v_desc, step, numbers, tensors, barriers, SIZES: gl.constexpr, TILE: gl.constexpr):
    """Bring all tiles of keys and values that the program's rows see, as fast as the rings have room.

    Keys run one tile ahead of values, in the order in which a consumer waits for them.
    """
    KEYS: gl.constexpr = TILE.keys
    k = Place(stage=gl.to_tensor(0), phase=gl.to_tensor(0))
    v = Place(stage=gl.to_tensor(0), phase=gl.to_tensor(0))
    cleaned = gl.to_tensor(0)
    absent = k_desc.shape[0]
    works = num_works(step.work, SIZES, TILE)
    for turn in range(0, (works + gl.num_programs(0) - 1) // gl.num_programs(0)):
        work, start, end = work_of(step, numbers, turn, works, SIZES, TILE)
        if work.is_live:
            table_row = step.requests.block_table + work.request.to(gl.int64) * numbers.table_stride
            first, last = key_tiles(start, end, KEYS)
            for tile in range(first, last + 1):
                if tile < last:
                    blocks = look_up(tile, table_row, start, end, absent, SIZES, TILE)
                    mbarrier.wait(barriers.k_empty.index(k.stage), k.phase ^ 1)
                    barrier = barriers.k_full.index(k.stage)
                    copy_tile(k_desc, tensors.k, barrier, k.stage, tile, work.kv_head, blocks, SIZES, TILE)
                    k = advance(k, TILE.stages)
                if tile > first:
                    blocks = look_up(tile - 1, table_row, start, end, absent, SIZES, TILE)
                    mbarrier.wait(barriers.v_empty.index(v.stage), v.phase ^ 1)
                    cleaned = copy_values(
                        v_desc, tensors.v, barriers, v, cleaned, tile - 1, work, blocks, SIZES, TILE
                    )  # fmt: skip
                    v = advance(v, TILE.stages)
