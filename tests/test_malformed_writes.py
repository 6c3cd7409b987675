"""Arguments that the cache updates and merge_states do not take: one error each, word for word."""

from __future__ import annotations

import pytest
import torch

from pageproof.reference import Scales

from .malformed_arguments import (
    BLOCK_SIZE,
    BLOCKS,
    FLOAT8,
    HEADS,
    KV_HEADS,
    RANK,
    ROPE,
    SIZE,
    TOKENS,
    Row,
    check,
    int32,
    merge_states,
    ones,
    update_kv_cache,
    update_mla_cache,
)

BAD_WRITES: list[Row] = [
    (
        update_kv_cache,
        {"slot_mapping": int32(0, 1, 2, 3, 4)},
        TypeError,
        "slot_mapping: found torch.int32, expected int64",
    ),
    (
        update_kv_cache,
        {"slot_mapping": torch.arange(10)[::2]},
        ValueError,
        "slot_mapping: found stride 2, expected a contiguous tensor",
    ),
    (
        update_kv_cache,
        {"slot_mapping": torch.arange(6)},
        ValueError,
        "key: found 5 rows, expected at least slot_mapping's 6",
    ),
    (update_kv_cache, {"value": ones(6, KV_HEADS, SIZE)}, ValueError, "value: found 6 rows, expected key's 5"),
    (
        update_kv_cache,
        {"key": ones(TOKENS, HEADS, SIZE)},
        ValueError,
        "key: found heads (4, 8), expected k_cache's (2, 8)",
    ),
    (
        update_kv_cache,
        {"value": ones(TOKENS, KV_HEADS, SIZE + 1)},
        ValueError,
        "value: found heads (2, 9), expected v_cache's (2, 8)",
    ),
    (
        update_kv_cache,
        {"key": ones(TOKENS, KV_HEADS, SIZE).half()},
        TypeError,
        "value: found torch.float32, expected float16",
    ),
    (
        update_kv_cache,
        {"k_cache": ones(BLOCKS, BLOCK_SIZE, KV_HEADS, SIZE).half()},
        TypeError,
        "k_cache: found torch.float16, expected float32 or float8_e4m3fn",
    ),
    (
        update_kv_cache,
        {"key": ones(TOKENS, KV_HEADS, SIZE).to(FLOAT8)},
        TypeError,
        "key: found torch.float8_e4m3fn, expected float32 or float16 or bfloat16 or float64",
    ),
    (
        update_kv_cache,
        {"key": ones(TOKENS, SIZE, KV_HEADS).transpose(1, 2)},
        ValueError,
        "key: found strides (16, 1, 2), expected a last dimension with stride 1",
    ),
    (
        update_kv_cache,
        {"v_cache": ones(BLOCKS, BLOCK_SIZE, 1, SIZE).expand(-1, -1, KV_HEADS, -1)},
        ValueError,
        "v_cache: found strides (32, 8, 0, 1), expected no expanded dimension in a tensor that is written",
    ),
    (
        update_kv_cache,
        {"scales": Scales(v=ones(1))},
        ValueError,
        "scales.v: found a scale beside a float32 tensor, expected None: only float8_e4m3fn is scaled",
    ),
    (
        update_mla_cache,
        {"k_pe": ones(TOKENS, ROPE + 1)},
        ValueError,
        "latent_cache: found rows of 8, expected 6 (latent) + 3 (k_pe)",
    ),
    (update_mla_cache, {"k_pe": ones(4, ROPE)}, ValueError, "k_pe: found 4 rows, expected latent's 5"),
    (
        update_mla_cache,
        {"latent": ones(TOKENS, 1, RANK)},
        ValueError,
        "latent: found shape (5, 1, 6), expected 2 dimensions",
    ),
    (
        merge_states,
        {"out_b": ones(TOKENS, HEADS, 9)},
        ValueError,
        "out_b: found shape (5, 4, 9), expected out_a's (5, 4, 8)",
    ),
    (
        merge_states,
        {"out_b": ones(TOKENS, HEADS, SIZE).half()},
        TypeError,
        "out_b: found torch.float16, expected float32",
    ),
    (
        merge_states,
        {"lse_a": ones(HEADS, TOKENS)},
        ValueError,
        "lse_a: found shape (4, 5), expected (5, 4) as out_a has it",
    ),
    (
        merge_states,
        {"lse_a": ones(TOKENS, HEADS).bfloat16()},
        TypeError,
        "lse_a: found torch.bfloat16, expected float32 or float64",
    ),
    (merge_states, {"out_a": 3}, TypeError, "out_a: found int, expected a torch.Tensor"),
]


@pytest.mark.parametrize("row", BAD_WRITES, ids=lambda row: row[3])
def test_updates_and_merge(row: Row) -> None:
    check(row, validate=False)
