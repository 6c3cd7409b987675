"""Launch choices but for the tiles: limits of a plan, program counts, and which architecture a device is.

Nothing here looks at a length, a page or any other value that changes from step to step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton

from .interpreter import INTERPRETED
from .tile_table import nearest_architecture

PER_MULTIPROCESSOR = 2  # programs of a persistent grid on each multiprocessor


@dataclass(frozen=True)
class PlanLimits:
    """The sizes that the plan and the attention kernels share."""

    decode_tokens: int  # requests with at most this many new tokens are split along their keys
    tile_tokens: int  # new tokens per item of the prefill list
    split_base: int  # keys of the shortest split
    split_cost: int  # what one more split costs, in keys
    partial_rows: int  # rows of partial results that all splits together may need
    own_splits: int = (
        0  # splits x new tokens, at most, of a request that is split by its own lengths; 0: by the batch's
    )


# The interpreter pays per program and tile, not per element; small limits let small batches reach every edge.
INTERPRETER_LIMITS = PlanLimits(decode_tokens=16, tile_tokens=32, split_base=64, split_cost=64, partial_rows=64)
# On an H200 a request of one token and 4096 keys takes 19.3 us with splits of 128 keys, 20.0 with 256.
GPU_LIMITS = PlanLimits(decode_tokens=16, tile_tokens=64, split_base=128, split_cost=128, partial_rows=512)


class PlanBlock(NamedTuple):
    """How the requests are divided among the programs of the plan."""

    requests: int  # that a program looks at at once
    num_warps: int
    share: int  # requests whose items it lists at once


# A single warp waits for no other; many requests at once are a table of 16 entries each, which more warps make in less
# time. On an H200, one plan behind the other in a graph: 2.6 us for 64 requests, 3.2 for 256, 5.4 for 1024.
INTERPRETER_PLAN_BLOCKS = (PlanBlock(64, 1, 16),)
GPU_PLAN_BLOCKS = (PlanBlock(64, 1, 4), PlanBlock(256, 4, 4), PlanBlock(1024, 8, 16))


OWN_SPLITS = 32


def plan_limits() -> PlanLimits:
    return INTERPRETER_LIMITS if INTERPRETED else GPU_LIMITS


@functools.cache
def invariant_limits(limits: PlanLimits) -> PlanLimits:
    """Those of plans that split each request by its own lengths: `partial_rows` does not bound what they need."""
    return replace(limits, own_splits=OWN_SPLITS)


def partial_rows(limits: PlanLimits, num_requests: int) -> int:
    """Room for the partial results of so many requests."""
    return max(limits.partial_rows, limits.own_splits * num_requests)


def plan_block(num_requests: int) -> PlanBlock:
    """The smallest that holds them all, or the largest."""
    blocks = INTERPRETER_PLAN_BLOCKS if INTERPRETED else GPU_PLAN_BLOCKS
    return next((block for block in blocks if num_requests <= block.requests), blocks[-1])


@functools.cache
def num_programs(device: torch.device) -> int:
    """Programs of a persistent grid: PER_MULTIPROCESSOR on each, two in the interpreter."""
    if INTERPRETED:
        return 2
    return PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def hopper_programs(device: torch.device) -> int:
    """Programs of a kernel for Hopper: one on each multiprocessor, whose shared memory it takes."""
    return num_programs(device) // PER_MULTIPROCESSOR


def plan_programs(device: torch.device) -> int:
    """Programs that splits are made for. In the interpreter so many that whatever can be split is split."""
    return 1 << 20 if INTERPRETED else num_programs(device)


def update_programs(device: torch.device) -> int:
    """Programs of a KV update, each of which waits for a few rows at a time: as many as a device can hold.

    On an H200 8192 tokens take 23 us; with the persistent grid of the others, 45.
    """
    return num_programs(device) if INTERPRETED else 8 * num_programs(device)


def update_elements() -> int:
    """Of keys, and as many of values, that a program of a KV update asks for at once."""
    return 4096


@functools.cache
def architecture(device: torch.device) -> str:
    """The key of the device in the table of tiles."""
    if INTERPRETED:
        return "interpreter"
    index = torch.cuda.current_device() if device.index is None else device.index
    # As Triton itself looks it up when it loads a kernel.
    shared_memory = int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])
    major, minor = torch.cuda.get_device_capability(index)
    return nearest_architecture("hip" if torch.version.hip else f"sm_{major}{minor}", shared_memory)


def request_programs(operation: str, *, num_query_heads: int, num_kv_heads: int) -> int:
    """What plan.make_plan asks for: programs of decode that work side by side on one request.

    One per kv head; decompressed MLA makes one of each query head. Absorbed MLA has tiles of 64 query heads, each of
    which takes a multiprocessor for itself: on an H200 64 requests x 4096 keys with 16 heads take 125 us, and 135 with
    splits for two programs on each.
    """
    if operation == "mla_attention":
        return PER_MULTIPROCESSOR * -(-num_query_heads // 64)
    return num_query_heads if operation == "mla_attention_decompressed" else num_kv_heads


def prefetched_steps() -> int:
    """Steps of 128 keys that absorbed MLA on Hopper asks of the L2 cache before it copies them.

    On an H200 128 requests x 4096 keys in pages of 64 take 308 us with one, 330 with none and 322 with two; in pages of
    16 348, 382 and 363.
    """
    return 1


def merge_programs(device: torch.device) -> int:
    """Programs of the merge, each of which waits for one row at a time: for sm_90 eight on a multiprocessor."""
    return num_programs(device) if INTERPRETED else 4 * num_programs(device)


def merge_options() -> dict[str, int]:
    """Launch options with which as many programs of the merge run at once, four warps each.

    Left alone, the assembler gives them 78 registers for absorbed MLA and 89 at head size 128 (Triton 3.6): six and
    five of eight would run. With 64 it spills 12 bytes for absorbed MLA, nothing at head size 128.
    """
    return {} if INTERPRETED or torch.version.hip else {"maxnreg": 64}


def splits_per_merge_step(padded_value: int) -> int:
    """Partial results that a merge program takes per step, all asked for at once, by the columns of each.

    On an H200 a step of absorbed MLA, 16 requests x 8192 keys and 128 heads, takes 198 us by eights, 208 by sixteens.
    """
    if INTERPRETED:
        return 16
    return max(8, min(32, 4096 // padded_value))


def rows_per_step() -> int:
    """Rows that a program takes per step which only writes or merges rows."""
    return 16


def projection_block() -> int:
    """kv_lora_rank elements per step of the decompressed kernel's up-projection."""
    return 64


def update_heads() -> int:
    """Heads that a KV-update program writes per step."""
    return 16
