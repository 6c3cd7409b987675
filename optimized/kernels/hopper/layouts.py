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
