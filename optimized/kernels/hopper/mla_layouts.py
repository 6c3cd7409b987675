"""Sizes and layouts of the tiles of absorbed MLA, which are always the same."""

from __future__ import annotations

import triton.experimental.gluon.language as gl

from . import sizes
from .layouts import product_layout, stored_layout, swizzled

ROWS = gl.constexpr(sizes.MLA_ROWS)
KEYS = gl.constexpr(sizes.MLA_KEYS)
RANK = gl.constexpr(sizes.MLA_RANK)  # columns of a latent row that are key and value
HALF = gl.constexpr(sizes.MLA_RANK // 2)  # those of them that one warp group sums
ROPE = gl.constexpr(sizes.MLA_ROPE)
CHUNK_BYTES = gl.constexpr(sizes.MLA_KEYS * sizes.CHUNK * 2)  # of one chunk of columns of a tile

SWIZZLED = gl.constexpr(swizzled(2))
SWIZZLED_BOX = gl.constexpr(swizzled(3))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))

# One warp group's accumulators: scores [64, 64], half of the output [64, 256].
SCORES = gl.constexpr(product_layout(sizes.MLA_KEYS))
OUTPUT = gl.constexpr(product_layout(sizes.MLA_RANK // 2))
STORED = gl.constexpr(stored_layout(sizes.CHUNK))
COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))  # of the producer's only warp
