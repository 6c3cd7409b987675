"""The tiles of prefill and decode: one table, by architecture, dtype, sizes and regime, and the function that reads it.

The tiles of sm_90 were measured on an H200. Those of the other architectures are not measured: they are the largest of
a few that fit into the shared memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Tiles:
    """One kernel's tile: rows (token, head) x keys, and how the compiler shall schedule it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    wide_m: int = 0  # of decode: rows of the tile if some request has more than block_m; 0: the same, several times


class Operands(Enum):
    """How keys and values come to be multiplied."""

    LOADED = "loaded"  # as they lie in the cache
    LATENT = "latent"  # absorbed MLA: a row is key and value, as it lies in the cache
    CAST_LATENT = "cast latent"  # the same after a cast
    COMPUTED = "computed"  # after a cast, a transposition or a projection


@dataclass(frozen=True)
class Need:
    """What a tile is asked for. Columns are padded; a key's are its head size and, for MLA, the rotary part."""

    prefill: bool  # else decode
    operands: Operands
    itemsize: int  # bytes of the arithmetic's format
    key_columns: int
    value_columns: int
    group: int  # query heads of a kv head


@dataclass(frozen=True)
class Row:
    """Tiles and what they are for. A COMPUTED row serves the other operands too, where nothing better stands above."""

    prefill: bool
    operands: Operands
    itemsize: int
    tiles: Tiles
    max_row_bytes: float = math.inf  # of a key and its value
    min_value_columns: int = 0
    min_group: int = 0

    def serves(self, need: Need) -> bool:
        return (
            self.prefill == need.prefill
            and self.operands in (need.operands, Operands.COMPUTED)
            and self.itemsize == need.itemsize
            and (need.key_columns + need.value_columns) * need.itemsize <= self.max_row_bytes
            and need.value_columns >= self.min_value_columns
            and need.group >= self.min_group
        )


@dataclass(frozen=True)
class Architecture:
    shared_memory: int  # bytes that one program may have
    rows: tuple[Row, ...]  # the first that serves and fits is taken
    holds_queries: bool = True  # in shared memory; else in registers


def shared_bytes(architecture: Architecture, tiles: Tiles, need: Need) -> int:
    """Bytes of shared memory that a kernel with these tiles takes: the queries, `num_stages` tiles of keys and values.

    A latent row is loaded once, and its probabilities go through shared memory too. Exact for warp-group products,
    more than what Triton 3.6 and 3.7.1 take for others. Less than that in two places, where they still fit: sm_100
    (1 KiB more; 213,552 bytes for the latent tile), and float32 weights of decompressed MLA (58,368 for 53,248).
    """
    is_latent = need.operands in (Operands.LATENT, Operands.CAST_LATENT)
    rows = max(tiles.block_m, tiles.wide_m)
    elements = rows * need.key_columns if architecture.holds_queries else 0
    elements += tiles.num_stages * tiles.block_n * (need.key_columns + (0 if is_latent else need.value_columns))
    elements += rows * tiles.block_n if is_latent else 0
    return elements * need.itemsize


def choose_tiles(architecture: str, need: Need) -> Tiles:
    """The first row of the architecture that serves and fits; if none fits, the last that serves."""
    found = ARCHITECTURES[architecture]
    serving = [row.tiles for row in found.rows if row.serves(need)]
    fitting = (tiles for tiles in serving if shared_bytes(found, tiles, need) <= found.shared_memory)
    return next(fitting, serving[-1])


def nearest_architecture(name: str, shared_memory: int) -> str:
    """`name` if the table has it, otherwise the unmeasured one with the most shared memory that the device has too."""
    if name in ARCHITECTURES:
        return name
    sizes = {known: found.shared_memory for known, found in ARCHITECTURES.items() if found.rows is UNMEASURED}
    fitting = [known for known, size in sizes.items() if size <= shared_memory]
    return max(fitting, key=sizes.__getitem__) if fitting else min(sizes, key=sizes.__getitem__)


PREFILL, DECODE = True, False
LOADED, LATENT, COMPUTED = Operands.LOADED, Operands.LATENT, Operands.COMPUTED
FEW_HEADS = 16  # query heads of one kv head, up to which a tile of as many rows is best
MANY_HEADS = FEW_HEADS + 1

ANYWHERE = (
    # Triton 3.6 addresses a right operand of fewer than 64 columns wrongly in a warp-group product, unless it was
    # copied to shared memory as it is, which takes rows that lie on 16 bytes: wrong sums, at times an illegal access
    # (fuzzing found it; triton-lang/triton#11366 is of its kind, and reported for 3.7.1). With fewer than 64 rows,
    # products are warp products, and right.
    Row(PREFILL, COMPUTED, 2, Tiles(64, 64, 4, 2), max_row_bytes=512, min_value_columns=64),
    Row(PREFILL, COMPUTED, 2, Tiles(32, 64, 4, 2), max_row_bytes=512),
    Row(PREFILL, COMPUTED, 2, Tiles(32, 32, 4, 2), max_row_bytes=1280),
    Row(PREFILL, COMPUTED, 2, Tiles(16, 16, 4, 2)),
    Row(DECODE, COMPUTED, 2, Tiles(16, 64, 4, 2), max_row_bytes=512),
    Row(DECODE, COMPUTED, 2, Tiles(16, 32, 4, 2), max_row_bytes=1280),
    Row(DECODE, COMPUTED, 2, Tiles(16, 16, 4, 2)),
    # No tensor cores: every product is unrolled into fused multiply-adds, which large tiles make slow to compile.
    Row(PREFILL, COMPUTED, 4, Tiles(32, 32, 4, 2), max_row_bytes=1280),
    Row(PREFILL, COMPUTED, 4, Tiles(16, 16, 4, 2)),
    Row(DECODE, COMPUTED, 4, Tiles(16, 32, 4, 2), max_row_bytes=1280),
    Row(DECODE, COMPUTED, 4, Tiles(16, 16, 4, 2)),
)
MEASURED = (
    # Head size 128: 358 TFLOP/s of prefill (293 with 64 rows, 335 with 128 keys); decode of 64 x 8192 at 98% of the
    # copy rate (81% with two stages, or with 128 keys in three); 16 tokens of each of 32 x 4096 in 153 us (465 without
    # the wide tile).
    Row(PREFILL, LOADED, 2, Tiles(128, 64, 8, 3), max_row_bytes=512, min_value_columns=64),
    Row(DECODE, LOADED, 2, Tiles(16, 64, 4, 3, wide_m=64), max_row_bytes=512, min_value_columns=64),
    # 128 requests x 4096, 128 heads, 576/512: 204 TFLOP/s; 16 x 16 50, 16 warps 101, one stage 177.
    Row(PREFILL, LATENT, 2, Tiles(64, 64, 8, 2), min_value_columns=64),
    Row(DECODE, LATENT, 2, Tiles(64, 64, 8, 2), min_value_columns=64, min_group=MANY_HEADS),
    # 16 heads, 64 x 4096: 172 us; 64 keys in two stages 183, 64 rows 222, 16 x 16 213.
    Row(PREFILL, LATENT, 2, Tiles(16, 32, 4, 3), min_value_columns=64),
    Row(DECODE, LATENT, 2, Tiles(16, 32, 4, 3), min_value_columns=64),
    *ANYWHERE,
)
UNMEASURED = (
    Row(PREFILL, LOADED, 2, Tiles(128, 64, 8, 3), max_row_bytes=512, min_value_columns=64),
    Row(PREFILL, LOADED, 2, Tiles(128, 64, 8, 2), max_row_bytes=512, min_value_columns=64),
    Row(DECODE, LOADED, 2, Tiles(16, 64, 4, 3, wide_m=64), max_row_bytes=512, min_value_columns=64),
    Row(DECODE, LOADED, 2, Tiles(16, 64, 4, 2, wide_m=64), max_row_bytes=512, min_value_columns=64),
    # 64 keys would fit into sm_100 by `shared_bytes`, but there Triton 3.6 takes 352,816 bytes.
    Row(PREFILL, LATENT, 2, Tiles(64, 32, 8, 2), min_value_columns=64),
    Row(DECODE, LATENT, 2, Tiles(64, 32, 8, 2), min_value_columns=64, min_group=MANY_HEADS),
    Row(PREFILL, LATENT, 2, Tiles(16, 32, 4, 3), min_value_columns=64),
    Row(PREFILL, LATENT, 2, Tiles(16, 32, 4, 2), min_value_columns=64),
    Row(DECODE, LATENT, 2, Tiles(16, 32, 4, 3), min_value_columns=64),
    Row(DECODE, LATENT, 2, Tiles(16, 32, 4, 2), min_value_columns=64),
    *ANYWHERE,
    *(Row(regime, COMPUTED, itemsize, Tiles(16, 16, 4, 1)) for regime in (PREFILL, DECODE) for itemsize in (2, 4)),
)
# The interpreter pays per program and tile, not per element.
INTERPRETER = tuple(
    Row(regime, COMPUTED, itemsize, Tiles(32, 32, 4, 1, wide_m=64))
    for regime in (PREFILL, DECODE)
    for itemsize in (2, 4)
)
ARCHITECTURES = {
    "sm_80": Architecture(163 * 1024, UNMEASURED),
    "sm_86": Architecture(99 * 1024, UNMEASURED),
    "sm_89": Architecture(99 * 1024, UNMEASURED),
    "sm_90": Architecture(227 * 1024, MEASURED),
    "sm_100": Architecture(227 * 1024, UNMEASURED),
    "gfx9": Architecture(64 * 1024, UNMEASURED, holds_queries=False),  # AMD: 64 KiB of LDS, as MI200 and MI300 have
    "interpreter": Architecture(1 << 40, INTERPRETER),
}
