"""The producers: a warp for the even and one for the odd tiles, which bring them into shared memory.

They wait for nothing but for a buffer to be empty, so that the first tiles of the next work arrive while the last of
this one are multiplied. Two of them, because a tile of small pages is some dozens of copies.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .layouts import CHUNK
from .mla_layouts import CHUNK_BYTES, HALF, KEYS, LANES, RANK, ROPE, ROWS, SWIZZLED_BOX
from .mla_work import find_work, has_rows, num_works

# A row of 1152 bytes, cache line by cache line. The instruction for a whole row is issued lane by lane.
PREFETCH_ROW = gl.constexpr(
    "".join(f"prefetch.global.L2 [$1+{place}];\n" for place in range(0, (512 + 64) * 2, 128)) + "mov.u32 $0, 0;"
)


@gluon.jit
def box_of(work, first_key, BOX: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """(block, slot) of a box; beyond the last that is needed it is the last one again, whose page exists."""
    key = gl.minimum(first_key, (work.end - 1) // BOX * BOX)
    return gl.load(work.table + key // BLOCK_SIZE), key % BLOCK_SIZE


@gluon.jit
def boxes_of(work, first_key, COUNT: gl.constexpr, BOX: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """Those of COUNT neighbouring boxes."""
    if COUNT == 1:
        return (box_of(work, first_key, BOX, BLOCK_SIZE),)
    else:
        first = boxes_of(work, first_key, COUNT // 2, BOX, BLOCK_SIZE)
        second = boxes_of(work, first_key + COUNT // 2 * BOX, COUNT // 2, BOX, BLOCK_SIZE)
        return first + second


@gluon.jit
def copy_columns(cache, buffer, full, boxes, zero, COLUMN: gl.constexpr, COLUMNS: gl.constexpr):
    """Start the copies of a tile's columns [COLUMN, COLUMN + COLUMNS).

    zero: 0, which the compiler must not know. Unrolled, the copies of small pages have their instructions prepared all
    before the first one is issued, in more registers than a producer has.
    """
    BOXES: gl.constexpr = KEYS // cache.block_shape[1]
    for chunk in range(0, zero + COLUMNS // CHUNK):
        for box in gl.static_range(BOXES):
            block, slot = boxes[box]
            place = [block, slot, COLUMN + chunk * CHUNK]
            tma.async_copy_global_to_shared(cache, place, full, buffer.index(chunk * BOXES + box))


@gluon.jit
def fill_left(cache, tile, boxes, phase, zero, WITH_ROPE: gl.constexpr):
    mbarrier.wait(tile.on_left.empty, phase)
    mbarrier.expect(tile.on_left.full, (HALF // CHUNK + (1 if WITH_ROPE else 0)) * CHUNK_BYTES)
    copy_columns(cache, tile.left, tile.on_left.full, boxes, zero, 0, HALF)
    if WITH_ROPE:
        copy_columns(cache, tile.rope, tile.on_left.full, boxes, zero, RANK, ROPE)


@gluon.jit
def fill_right(cache, tile, boxes, phase, zero, WITH_ROPE: gl.constexpr):
    mbarrier.wait(tile.on_right.empty, phase)
    mbarrier.expect(tile.on_right.full, (HALF // CHUNK + (1 if WITH_ROPE else 0)) * CHUNK_BYTES)
    copy_columns(cache, tile.right, tile.on_right.full, boxes, zero, HALF, HALF)
    if WITH_ROPE:
        copy_columns(cache, tile.rope, tile.on_right.full, boxes, zero, RANK, ROPE)


@gluon.jit
def copy_queries(queries, half, full, token, head, COLUMN: gl.constexpr):
    """Start the copies of columns [COLUMN, COLUMN + HALF)."""
    BOX: gl.constexpr = [queries.block_shape[0], queries.block_shape[1], CHUNK]
    for chunk in gl.static_range(HALF // CHUNK):
        place = half.index(chunk)._reinterpret(half.dtype, BOX, SWIZZLED_BOX)
        tma.async_copy_global_to_shared(queries, [token, head, COLUMN + chunk * CHUNK], full, place)


@gluon.jit
def fill_q(queries, q, work, phase, SIZES: gl.constexpr):
    """Rows beyond the request's are another's or, beyond the tensor, zeros: nothing of theirs is stored."""
    if SIZES.group % ROWS == 0 or ROWS % SIZES.group == 0:
        token = work.item.span.first_row + work.first_pair // SIZES.group
        head = work.first_pair % SIZES.group
    else:  # the descriptor has all rows (token, head) in one dimension
        token = 0
        head = work.item.span.first_row * SIZES.group + work.first_pair
    mbarrier.wait(q.barriers.empty, phase)
    mbarrier.expect(q.barriers.full, RANK // CHUNK * CHUNK_BYTES)
    copy_queries(queries, q.left, q.barriers.full, token, head, 0)
    copy_queries(queries, q.right, q.barriers.full, token, head, HALF)


@gluon.jit
def prefetch_tile(job, work, first_key, SIZES: gl.constexpr):
    """Ask for the rows of a tile of keys to come to the L2 cache: two buffers do not cover the memory's latency."""
    latent = job.step.cache.k
    if first_key < work.end:
        keys = gl.minimum(gl.maximum(first_key + gl.arange(0, KEYS, layout=LANES), work.start), work.end - 1)
        block = gl.load(work.table + keys // SIZES.block_size).to(gl.int64)
        slot = (keys % SIZES.block_size).to(gl.int64)
        rows = latent.base + block * latent.stride_block + slot * latent.stride_slot
        gl.inline_asm_elementwise(
            PREFETCH_ROW, "=r,l", [rows.to(gl.int64, bitcast=True)], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def fill_tile(cache, tile, boxes, phase, zero, EVEN: gl.constexpr):
    """Each tile in the order in which the warp groups empty and need its halves."""
    if EVEN:
        fill_left(cache, tile, boxes, phase, zero, True)
        fill_right(cache, tile, boxes, phase, zero, False)
    else:
        fill_right(cache, tile, boxes, phase, zero, True)
        fill_left(cache, tile, boxes, phase, zero, False)


@gluon.jit
def produce(
    queries, cache, shared, tile, job,
    SIZES: gl.constexpr, PREFILL: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """The even or the odd tiles of all works; the even one's producer brings q as well."""
    BOX: gl.constexpr = cache.block_shape[1]
    steps = 0
    works = 0
    for index in range(gl.program_id(0), num_works(job, SIZES, PREFILL), gl.num_programs(0)):
        work = find_work(job, index, BOX, SIZES, PREFILL)
        if has_rows(work, SIZES) & (work.num_steps > 0):
            key = work.first_key + (0 if EVEN else KEYS)
            for ahead in gl.static_range(AHEAD):
                prefetch_tile(job, work, key + ahead * (2 * KEYS), SIZES)
            if EVEN:
                fill_q(queries, shared.q, work, (works & 1) ^ 1, SIZES)
            for i in range(work.num_steps):
                boxes = boxes_of(work, key, KEYS // BOX, BOX, SIZES.block_size)
                fill_tile(cache, tile, boxes, ((steps + i) & 1) ^ 1, job.numbers.bias_width, EVEN)
                if AHEAD > 0:
                    prefetch_tile(job, work, key + AHEAD * (2 * KEYS), SIZES)
                key += 2 * KEYS
            steps += work.num_steps
            works += 1
