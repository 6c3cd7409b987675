"""What one attention operation is compiled for: its sizes, and the tiles that fit them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .kernels.sizes import AttentionSizes, RowSizes, Tile
from .launching import Constants
from .tile_table import Need, Operands, Tiles, choose_tiles
from .tuning import merge_options, plan_limits, projection_block, rows_per_step, splits_per_merge_step

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def padded(size: int) -> int:
    """The power of two that `size` is padded to, at least the 16 that tl.dot needs."""
    return max(int(triton.next_power_of_2(size)), 16)


@dataclass(frozen=True)
class Shape:
    """The sizes that kernels are compiled for."""

    num_kv_heads: int
    group: int
    head_size: int
    head_size_v: int
    block_size: int
    arithmetic: torch.dtype  # what tl.dot multiplies, and P is cast to
    architecture: str  # a key of tile_table.ARCHITECTURES
    operands: Operands
    rope_size: int = 0
    rank: int = 0  # kv_lora_rank of decompressed MLA


@functools.lru_cache(maxsize=1024)
def tiles(shape: Shape, *, prefill: bool) -> Tiles:
    """The tiles of prefill or decode; kept, because every launch asks for them."""
    need = Need(
        prefill=prefill,
        operands=shape.operands,
        itemsize=shape.arithmetic.itemsize,
        key_columns=padded(shape.head_size) + (padded(shape.rope_size) if shape.rope_size else 0),
        value_columns=padded(shape.head_size_v),
        group=shape.group,
    )
    return choose_tiles(shape.architecture, need)


@functools.lru_cache(maxsize=1024)
def attention_sizes(shape: Shape, causal: bool) -> AttentionSizes:
    """The compile-time argument of prefill and decode; kept, because a launch would make it anew each time."""
    return AttentionSizes(
        num_kv_heads=shape.num_kv_heads,
        group=shape.group,
        head_size=shape.head_size,
        head_size_v=shape.head_size_v,
        rope_size=shape.rope_size,
        rank=shape.rank,
        block_size=shape.block_size,
        padded_head=padded(shape.head_size),
        padded_value=padded(shape.head_size_v),
        padded_rope=padded(shape.rope_size),
        rank_step=min(projection_block(), padded(shape.rank)),
        tile_tokens=plan_limits().tile_tokens,
        partial_rows=plan_limits().partial_rows,
        causal=causal,
        arithmetic=KINDS[shape.arithmetic],
    )


@functools.lru_cache(maxsize=1024)
def prefill_constants(shape: Shape, causal: bool) -> Constants:
    return {"SIZES": attention_sizes(shape, causal), **_tile_constants(tiles(shape, prefill=True))}


@functools.lru_cache(maxsize=1024)
def decode_constants(shape: Shape, causal: bool) -> Constants:
    chosen = tiles(shape, prefill=False)
    wide = Tile(chosen.wide_m, chosen.block_n) if chosen.wide_m else None
    return {"SIZES": attention_sizes(shape, causal), "WIDE": wide, **_tile_constants(chosen)}


def _tile_constants(chosen: Tiles) -> Constants:
    return {
        "TILE": Tile(chosen.block_m, chosen.block_n),
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }


@functools.lru_cache(maxsize=1024)
def row_constants(num_query_heads: int, head_size_v: int) -> Constants:
    return {"SIZES": row_sizes(num_query_heads, head_size_v)}


@functools.lru_cache(maxsize=1024)
def merge_constants(num_query_heads: int, head_size_v: int, group: int) -> Constants:
    """Those of the merge of splits."""
    return {"SIZES": row_sizes(num_query_heads, head_size_v, group), **merge_options()}


def row_sizes(num_query_heads: int, head_size_v: int, group: int = 1) -> RowSizes:
    """The compile-time argument of the merges."""
    columns = padded(head_size_v)
    return RowSizes(
        num_query_heads=num_query_heads,
        group=group,
        head_size_v=head_size_v,
        padded_value=columns,
        partial_rows=plan_limits().partial_rows,
        rows_step=rows_per_step(),
        splits_step=splits_per_merge_step(columns),
    )
