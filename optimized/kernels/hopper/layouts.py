"""How tiles lie in shared memory and in registers, and the places where Triton 3.6 and 3.7 name a thing differently."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import sizes

CHUNK = gl.constexpr(sizes.CHUNK)
SWIZZLE_ROWS = gl.constexpr(sizes.SWIZZLE_ROWS)
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())

synchronise = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the threads of one role


@gluon.constexpr_function
def swizzled(rank):
    """Of tiles, and of boxes with more dimensions, in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


@gluon.constexpr_function
def product_layout(columns):
    """Of one warp group's rows x `columns` as the tensor cores give them."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def weights_layout(columns):
    """Of weights as the left operand of a product with so many columns."""
    return gl.DotOperandLayout(0, product_layout(columns), 2)


@gluon.constexpr_function
def stored_layout(columns):
    """Of one warp group's 64 rows as they are written: 8 columns for a thread, 32 of a row side by side.

    The tensor cores leave 2 columns of every 8 to a thread: written like that they take four times the instructions,
    each with halves of memory sectors. Here a row stays with its warp, so that no other has to be waited for.
    """
    further = [[0, 32 << step] for step in range((columns // 32).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], *further],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, columns],
    )
