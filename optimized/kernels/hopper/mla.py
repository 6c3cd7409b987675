"""Absorbed MLA on Hopper: same work lists, partial results and rows as ../decode.py and ../prefill.py.

A program is four roles: two warp groups (mla_even.py, mla_odd.py) and a producer warp for each (mla_producer.py). All
walk the same list; it is one program per multiprocessor, for it takes all of its shared memory.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..arguments import Numbers
from .layouts import BARRIER, CHUNK, synchronise
from .mla_even import attend_even
from .mla_groups import Barriers, Handover, Job, KeyTile, QueryHalves, Shared
from .mla_layouts import HALF, KEYS, PLAIN, ROWS, SWIZZLED, SWIZZLED_BOX
from .mla_odd import attend_odd
from .mla_producer import produce

# The even warp group keeps what is left, 232: neither of the two spills in its loop. With 24 a producer spills seven
# times for each tile, between the moment when a buffer is empty and the first copies into it.
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(32)


@gluon.jit
def new_barrier(COUNT: gl.constexpr):
    barrier = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    mbarrier.init(barrier, count=COUNT)
    return barrier


@gluon.jit
def new_boxes(KIND: gl.constexpr, BOX: gl.constexpr, COLUMNS: gl.constexpr):
    """64 rows in boxes of [BOX, 64]: of one column of boxes all rows, then those of the next."""
    return gl.allocate_shared_memory(KIND, [COLUMNS // CHUNK * (KEYS // BOX), 1, BOX, CHUNK], SWIZZLED_BOX)


@gluon.jit
def new_key_tile(KIND: gl.constexpr, BOX: gl.constexpr):
    left = new_boxes(KIND, BOX, HALF)
    right = new_boxes(KIND, BOX, HALF)
    rope = new_boxes(KIND, BOX, CHUNK)
    on_left = Barriers(new_barrier(1), new_barrier(1))
    on_right = Barriers(new_barrier(1), new_barrier(1))
    return KeyTile(left, right, rope, on_left, on_right)


@gluon.jit
def new_queries(KIND: gl.constexpr):
    left = new_boxes(KIND, ROWS, HALF)
    right = new_boxes(KIND, ROWS, HALF)
    return QueryHalves(left, right, Barriers(new_barrier(1), new_barrier(2)))


@gluon.jit
def new_handover(KIND: gl.constexpr):
    weights = gl.allocate_shared_memory(KIND, [ROWS, KEYS], SWIZZLED)
    maximum = gl.allocate_shared_memory(gl.float32, [ROWS], PLAIN)
    total = gl.allocate_shared_memory(gl.float32, [ROWS], PLAIN)
    return Handover(weights, maximum, total, new_barrier(1), new_barrier(1), new_barrier(1))


@gluon.jit(do_not_specialize=Numbers._fields)
def attend_latent(
    queries, cache, step, partials,
    table_stride, sliding_window, right_window, bias_width, bias_stride,
    SIZES: gl.constexpr, PREFILL: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """All of one list, that of prefill or of decode.

    queries, cache: descriptors of q in boxes of 64 rows x 64 and of the latent rows in [1, BOX, 64]. AHEAD: how many
    steps of two tiles of keys are asked of the L2 cache before they are copied; 0 for none.
    """
    KIND: gl.constexpr = cache.dtype
    BOX: gl.constexpr = cache.block_shape[1]
    numbers = Numbers(table_stride, sliding_window, right_window, bias_width, bias_stride)
    job = Job(step, partials, numbers)
    q = new_queries(KIND)
    even = new_key_tile(KIND, BOX)
    odd = new_key_tile(KIND, BOX)
    shared = Shared(q, even, odd, new_handover(KIND), new_handover(KIND))
    fence_async_shared()
    synchronise()
    gl.warp_specialize(
        [
            (attend_even, (shared, job, BOX, SIZES, PREFILL)),
            (attend_odd, (shared, job, BOX, SIZES, PREFILL)),
            (produce, (queries, cache, shared, even, job, SIZES, PREFILL, AHEAD, True)),
            (produce, (queries, cache, shared, odd, job, SIZES, PREFILL, AHEAD, False)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
