"""How tiles lie in shared memory and in registers, and the places where Triton 3.6 and 3.7 name a thing differently."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# 64 rows (token, head) and 64 keys: the smallest tile that a warpgroup multiplies, and a tile of 576 columns is 72 KiB.
ROWS = gl.constexpr(64)
KEYS = gl.constexpr(64)
RANK = gl.constexpr(512)  # columns of a latent row that are key and value
HALF = gl.constexpr(256)  # those of them that one warpgroup sums
ROPE = gl.constexpr(64)
CHUNK = gl.constexpr(64)  # columns of one box: 128 bytes, the widest swizzle
CHUNK_BYTES = gl.constexpr(64 * 64 * 2)  # of a tile's 64 keys

SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
SWIZZLED_BOX = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())

# One warpgroup's accumulators: scores [64, 64], half of the output [64, 256].
SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))
COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))  # of the producer's only warp

synchronise = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the threads of one role
