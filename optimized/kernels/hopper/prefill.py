"""Prefill on Hopper: one warp brings tiles of keys and values, two warp groups attend with 64 rows each.

The same work, outputs and meaning as kernels/prefill.py.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..arguments import Numbers, Step
from .layouts import BARRIER, swizzled
from .prefill_consumer import consume
from .prefill_groups import Barriers, Tensors
from .prefill_producer import produce
from .sizes import CONSUMERS as NUM_CONSUMERS

CONSUMERS = gl.constexpr(NUM_CONSUMERS)
CONSUMER_REGISTERS = gl.constexpr(232)
PRODUCER_REGISTERS = gl.constexpr(40)


@gluon.jit
def allocate_ring_barriers(STAGES: gl.constexpr, EXTRA: gl.constexpr):
    """(full, empty) of one ring, and `EXTRA` more at the end of the first."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES + EXTRA, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES + EXTRA):
        mbarrier.init(full.index(stage), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return full, empty


@gluon.jit(do_not_specialize=Numbers._fields)
def hopper_prefill(
    k_desc, v_desc, queries, requests, rules, scales, outputs, work,
    table_stride, sliding_window, right_window, bias_width, bias_stride,
    SIZES: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = swizzled(2)
    KIND: gl.constexpr = SIZES.arithmetic
    numbers = Numbers(table_stride, sliding_window, right_window, bias_width, bias_stride)
    # The caches come as descriptors.
    step = Step(queries, None, requests, rules, scales, outputs, work)  # type: ignore[arg-type]
    tensors = Tensors(
        q=gl.allocate_shared_memory(KIND, [CONSUMERS, TILE.rows, SIZES.padded_head], LAYOUT),
        k=gl.allocate_shared_memory(KIND, [TILE.stages, TILE.keys, SIZES.padded_head], LAYOUT),
        v=gl.allocate_shared_memory(KIND, [TILE.stages, TILE.keys, SIZES.padded_value], LAYOUT),
    )
    k_full, k_empty = allocate_ring_barriers(TILE.stages, 0)
    v_full, v_empty = allocate_ring_barriers(TILE.stages, 1)
    barriers = Barriers(k_full=k_full, k_empty=k_empty, v_full=v_full, v_empty=v_empty)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (step, numbers, tensors, barriers, 0, SIZES, TILE)),
            (consume, (step, numbers, tensors, barriers, 1, SIZES, TILE)),
            (produce, (k_desc, v_desc, step, numbers, tensors, barriers, SIZES, TILE)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
