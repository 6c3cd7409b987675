"""Launch choices as data: pure functions from what the host can see to tile sizes and program counts.

Nothing here looks at a length, a page or any other value that changes from step to step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from .interpreter import INTERPRETED

PER_MULTIPROCESSOR = 2  # programs of a persistent grid on each multiprocessor
FEW_HEADS = 16  # query heads of one kv head, up to which a tile of as many rows is best


@dataclass(frozen=True)
class PlanLimits:
    """The sizes that the plan and the attention kernels share."""

    decode_tokens: int  # requests with at most this many new tokens are split along their keys
    tile_tokens: int  # new tokens per item of the prefill list
    split_base: int  # keys of the shortest split
    split_cost: int  # what one more split costs, in keys
    partial_rows: int  # rows of partial results that all splits together may need
    block: int  # requests and items that a plan program handles at once


@dataclass(frozen=True)
class Tiles:
    """One kernel's tile: rows (token, head) x keys, and how the compiler shall schedule it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    wide_m: int = 0  # of decode: rows of the tile if some request has more than block_m; 0: the same, several times


# The interpreter pays per program and tile, not per element; small limits let small batches reach every edge.
INTERPRETER_LIMITS = PlanLimits(
    decode_tokens=16, tile_tokens=32, split_base=64, split_cost=64, partial_rows=64, block=64
)
GPU_LIMITS = PlanLimits(decode_tokens=16, tile_tokens=64, split_base=256, split_cost=128, partial_rows=512, block=256)


def plan_limits() -> PlanLimits:
    return INTERPRETER_LIMITS if INTERPRETED else GPU_LIMITS


@functools.cache
def num_programs(device: torch.device) -> int:
    """Programs of a persistent grid: PER_MULTIPROCESSOR on each, two in the interpreter."""
    if INTERPRETED:
        return 2
    return PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def plan_programs(device: torch.device) -> int:
    """Programs that splits are made for. In the interpreter so many that whatever can be split is split."""
    return 1 << 20 if INTERPRETED else num_programs(device)


def update_programs(device: torch.device) -> int:
    """Programs of a KV update, each of which waits for one row at a time: as many as a device can hold.

    On an H200 8192 tokens take 23 us; with the persistent grid of the others, 45.
    """
    return num_programs(device) if INTERPRETED else 8 * num_programs(device)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have, as Triton itself looks it up when it loads a kernel."""
    if INTERPRETED:
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def request_programs(operation: str, *, num_query_heads: int, num_kv_heads: int) -> int:
    """What plan.make_plan asks for: programs of decode that work side by side on one request.

    One per kv head; decompressed MLA makes one of each query head. Absorbed MLA has tiles of 64 query heads, each of
    which takes a multiprocessor for itself, or one tile of few.
    """
    if operation == "mla_attention":
        return 1 if num_query_heads <= FEW_HEADS else PER_MULTIPROCESSOR * -(-num_query_heads // 64)
    return num_query_heads if operation == "mla_attention_decompressed" else num_kv_heads


def latent_tiles(
    *, few_heads: bool, latent_bytes: int, itemsize: int, columns: int, shared_memory: int
) -> Tiles | None:
    """Tiles of absorbed MLA over a cache in q's format, whose rows are keys and values at once; None: as any other.

    few_heads: decode of at most FEW_HEADS query heads, of however many tokens; latent_bytes: one padded cache row;
    columns: kv_lora_rank, padded; shared_memory: bytes.
    """
    if INTERPRETED or itemsize != 2 or columns < 64:
        return None
    rows, keys = 64, 64
    # The queries, two stages of keys, and the probabilities.
    needed = (rows + 2 * keys) * latent_bytes + rows * keys * itemsize
    if not few_heads and needed <= shared_memory:
        # H200, 128 requests x 4096, 128 heads, 576/512: 204 TFLOP/s; 16 x 16 50, 16 warps 101, one stage 177.
        return Tiles(rows, keys, num_warps=8, num_stages=2)
    if (FEW_HEADS + 3 * 32) * latent_bytes <= shared_memory:
        # 16 heads, 64 x 4096: 172 us; 64 keys in two stages 183, 64 rows 222, 16 x 16 213.
        return Tiles(FEW_HEADS, 32, num_warps=4, num_stages=3)
    return None


def attention_tiles(
    *, prefill: bool, row_bytes: int, itemsize: int, value_columns: int, computed_operands: bool
) -> Tiles:
    """Tiles of the attention kernels.

    row_bytes: one key and one value row in the arithmetic's format, whose elements have `itemsize` bytes;
    value_columns: head_size_v, padded; computed_operands: keys or values are not multiplied as they were loaded
    but after a cast, a transposition or a projection.
    """
    if INTERPRETED:
        return Tiles(block_m=32, block_n=32, num_warps=4, num_stages=1, wide_m=64)
    if itemsize == 2 and row_bytes <= 512 and value_columns >= 64 and not computed_operands:
        # Measured on an H200 at head size 128: 358 TFLOP/s of prefill (293 with 64 rows, 335 with 128 keys); decode of
        # 64 x 8192 at 98% of the copy rate (81% with two stages, or with 128 keys in three); 16 tokens of each of
        # 32 x 4096 in 153 us (465 without the wide tile).
        if prefill:
            return Tiles(128, 64, num_warps=8, num_stages=3)
        return Tiles(16, 64, num_warps=4, num_stages=3, wide_m=64)
    # Two stages of a key and a value tile have to fit into shared memory beside the queries and probabilities.
    block_n = 64 if row_bytes <= 512 else 32 if row_bytes <= 1280 else 16
    block_m = 64 if prefill and row_bytes <= 1280 else 16
    if itemsize == 4:
        # No tensor cores: every product is unrolled into fused multiply-adds, which large tiles make slow to compile.
        block_m, block_n = min(block_m, 32), min(block_n, 32)
    if min(block_n, value_columns) < 64:
        # Triton 3.6 addresses a right operand of fewer than 64 columns wrongly in a warp-group product, unless it was
        # copied to shared memory as it is, which takes rows that lie on 16 bytes: wrong sums, at times an illegal
        # access (fuzzing found it; triton-lang/triton#11366 is of its kind, and reported for 3.7.1). With fewer than
        # 64 rows, products are warp products, and right.
        block_m = min(block_m, 32)
    return Tiles(block_m=block_m, block_n=block_n, num_warps=4, num_stages=2)


def splits_per_merge_step() -> int:
    """Partial results that a merge program takes per step."""
    return 16


def rows_per_step() -> int:
    """Rows that a program takes per step which only writes or merges rows."""
    return 16


def projection_block() -> int:
    """kv_lora_rank elements per step of the decompressed kernel's up-projection."""
    return 64


def update_heads() -> int:
    """Heads that a KV-update program writes per step."""
    return 16
