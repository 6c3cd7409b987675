"""What kernels are compiled for: each class is one compile-time argument, read by attribute inside of a kernel.

Frozen, so that Triton can look a compiled kernel up by it: equal sizes are one kernel, any other field is another.
`padded_*` is the power of two, at least 16, that a size is padded to.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl


@dataclass(frozen=True)
class AttentionSizes:
    """Of prefill and decode, beside their tile."""

    num_kv_heads: int
    group: int  # query heads of a kv head
    head_size: int
    head_size_v: int
    rope_size: int  # qk_rope_head_dim of MLA; else 0
    rank: int  # kv_lora_rank of decompressed MLA; else 0
    block_size: int
    padded_head: int
    padded_value: int
    padded_rope: int
    rank_step: int  # kv_lora_rank elements that the up-projection takes at a time
    tile_tokens: int  # new tokens per item of the prefill list
    partial_rows: int  # the decode list has room for as many items, at least
    causal: bool
    arithmetic: tl.dtype  # what tl.dot multiplies, and P is cast to


@dataclass(frozen=True)
class Tile:
    """Rows (token, head) x keys that a program of an attention kernel holds at once."""

    rows: int
    keys: int


@dataclass(frozen=True)
class RowSizes:
    """Of the kernels that only write rows of `out` and `lse`: the merges and the padding."""

    num_query_heads: int
    group: int
    head_size_v: int
    padded_value: int
    partial_rows: int  # the merge list has room for as many items
    rows_step: int  # rows that a program takes at a time
    splits_step: int  # splits of one row that a program takes at a time


@dataclass(frozen=True)
class UpdateSizes:
    """Of the KV update."""

    num_kv_heads: int
    head_size: int
    head_size_v: int
    block_size: int
    padded_head: int
    padded_value: int
    tokens_step: int  # tokens, and heads of each, that a program takes at a time
    heads_step: int
