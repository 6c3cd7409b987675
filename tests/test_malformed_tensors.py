"""Tensors that do not fit each other in the attention operations: one error each, word for word."""

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
    NOPE,
    RANK,
    ROPE,
    SIZE,
    SIZE_V,
    TOKENS,
    Changes,
    Row,
    attention,
    check,
    meta,
    mla_attention,
    mla_attention_decompressed,
    ones,
)

BAD_ATTENTION: list[tuple[Changes, type[Exception], str]] = [
    ({"q": None}, TypeError, "q: found NoneType, expected a torch.Tensor"),
    ({"q": ones(TOKENS, HEADS * SIZE)}, ValueError, "q: found shape (5, 32), expected 3 dimensions"),
    (
        {"q": torch.ones(TOKENS, HEADS, SIZE, dtype=torch.int8)},
        TypeError,
        "q: found torch.int8, expected float32 or float16 or bfloat16 or float64 or float8_e4m3fn",
    ),
    (
        {"q": meta(TOKENS, HEADS, SIZE)},
        ValueError,
        "q: found a tensor on meta, expected one on cpu like the other arguments",
    ),
    (
        {"q": ones(TOKENS, SIZE, HEADS).transpose(1, 2)},
        ValueError,
        "q: found strides (32, 1, 4), expected a last dimension with stride 1",
    ),
    ({"q": ones(TOKENS, 0, SIZE)}, ValueError, "q: found shape (5, 0, 8), expected no empty dimension but the first"),
    ({"q": ones(TOKENS, 3, SIZE)}, ValueError, "q: found 3 query heads, expected a multiple of k_cache's 2 kv heads"),
    ({"q": ones(TOKENS, 1, SIZE)}, ValueError, "q: found 1 query heads, expected a multiple of k_cache's 2 kv heads"),
    ({"q": ones(TOKENS, HEADS, 9)}, ValueError, "k_cache: found head_size 8, expected q's head_size 9"),
    (
        {"q": ones(TOKENS, HEADS, SIZE).half()},
        TypeError,
        "k_cache: found torch.float32, expected float16 or float8_e4m3fn",
    ),
    (
        {"q": ones(TOKENS, HEADS, SIZE).to(FLOAT8)},
        TypeError,
        "k_cache: found torch.float32, expected float8_e4m3fn",
    ),
    ({"k_cache": ones(BLOCKS, BLOCK_SIZE, 16)}, ValueError, "k_cache: found shape (6, 4, 16), expected 4 dimensions"),
    (
        {"k_cache": ones(BLOCKS, 0, KV_HEADS, SIZE)},
        ValueError,
        "k_cache: found shape (6, 0, 2, 8), expected no empty dimension but the first",
    ),
    (
        {"k_cache": ones(BLOCKS, BLOCK_SIZE, KV_HEADS, SIZE).to(FLOAT8)},
        TypeError,
        "v_cache: found torch.float32, expected k_cache's float8_e4m3fn",
    ),
    (
        {"k_cache": ones(BLOCKS, BLOCK_SIZE, KV_HEADS, SIZE).to(torch.float8_e5m2)},
        TypeError,
        "k_cache: found torch.float8_e5m2, expected float32 or float8_e4m3fn",
    ),
    (
        {"v_cache": ones(BLOCKS + 1, BLOCK_SIZE, KV_HEADS, SIZE)},
        ValueError,
        "v_cache: found num_blocks 7, expected k_cache's num_blocks 6",
    ),
    (
        {"v_cache": ones(BLOCKS, 16, KV_HEADS, SIZE)},
        ValueError,
        "v_cache: found block_size 16, expected k_cache's block_size 4",
    ),
    (
        {"v_cache": ones(BLOCKS, BLOCK_SIZE, 4, SIZE)},
        ValueError,
        "v_cache: found num_kv_heads 4, expected k_cache's num_kv_heads 2",
    ),
    (
        {"v_cache": meta(BLOCKS, BLOCK_SIZE, KV_HEADS, SIZE)},
        ValueError,
        "v_cache: found a tensor on meta, expected one on cpu like the other arguments",
    ),
    ({"out": ones(TOKENS, HEADS, 9)}, ValueError, "out: found shape (5, 4, 9), expected (5, 4, 8)"),
    ({"out": ones(4, HEADS, SIZE)}, ValueError, "out: found shape (4, 4, 8), expected (5, 4, 8)"),
    (
        {"out": ones(TOKENS, HEADS, SIZE).int()},
        TypeError,
        "out: found torch.int32, expected float32 or float16 or bfloat16 or float64 or float8_e4m3fn",
    ),
    (
        {"out": ones(TOKENS, SIZE, HEADS).transpose(1, 2)},
        ValueError,
        "out: found strides (32, 1, 4), expected a last dimension with stride 1",
    ),
    (
        {"out": ones(1, HEADS, SIZE).expand(TOKENS, -1, -1)},
        ValueError,
        "out: found strides (0, 8, 1), expected no expanded dimension in a tensor that is written",
    ),
    (
        {"out": meta(TOKENS, HEADS, SIZE)},
        ValueError,
        "out: found a tensor on meta, expected one on cpu like the other arguments",
    ),
    ({"lse": ones(HEADS, TOKENS)}, ValueError, "lse: found shape (4, 5), expected (5, 4)"),
    ({"lse": ones(TOKENS, HEADS).half()}, TypeError, "lse: found torch.float16, expected float32 or float64"),
    (
        {"lse": ones(HEADS, TOKENS).T},
        ValueError,
        "lse: found strides (1, 5), expected a last dimension with stride 1",
    ),
    (
        {"scales": Scales(k=ones(1))},
        ValueError,
        "scales.k: found a scale beside a float32 tensor, expected None: only float8_e4m3fn is scaled",
    ),
    (
        {"scales": Scales(q=ones(1))},
        ValueError,
        "scales.q: found a scale beside a float32 tensor, expected None: only float8_e4m3fn is scaled",
    ),
    (
        {"scales": Scales(out=ones(1))},
        ValueError,
        "scales.out: found a scale beside a float32 tensor, expected None: only float8_e4m3fn is scaled",
    ),
    (
        {"scales": Scales(out=ones(4)), "out": ones(TOKENS, HEADS, SIZE).to(FLOAT8)},
        ValueError,
        "scales.out: found 4 entries, expected one, or one for each of 2 kv heads",
    ),
    (
        {"scales": Scales(out=meta(1)), "out": ones(TOKENS, HEADS, SIZE).to(FLOAT8)},
        ValueError,
        "scales.out: found a tensor on meta, expected one on cpu like the other arguments",
    ),
]

BAD_MLA: list[Row] = [
    (
        mla_attention,
        {"q_pe": ones(TOKENS, HEADS + 1, ROPE)},
        ValueError,
        "q_pe: found 5 tokens x 5 heads, expected q_nope's 5 tokens x 4 heads",
    ),
    (
        mla_attention,
        {"q_pe": ones(TOKENS, HEADS, ROPE).half()},
        TypeError,
        "q_pe: found torch.float16, expected float32",
    ),
    (
        mla_attention,
        {"latent_cache": ones(BLOCKS, BLOCK_SIZE, RANK)},
        ValueError,
        "latent_cache: found rows of 6, expected 6 (kv_lora_rank, from q_nope) + 2 (q_pe)",
    ),
    (
        mla_attention,
        {"latent_cache": ones(BLOCKS, BLOCK_SIZE, 1, RANK + ROPE)},
        ValueError,
        "latent_cache: found shape (6, 4, 1, 8), expected 3 dimensions",
    ),
    (
        mla_attention,
        {"latent_cache": ones(BLOCKS, BLOCK_SIZE, RANK + ROPE).to(FLOAT8), "scales": Scales(v=ones(1))},
        ValueError,
        "scales.v: found a scale with no such tensor, expected None: only float8_e4m3fn is scaled",
    ),
    (
        mla_attention,
        {"latent_cache": ones(BLOCKS, BLOCK_SIZE, RANK + ROPE).to(FLOAT8), "scales": Scales(k=ones(4))},
        ValueError,
        "scales.k: found 4 entries, expected one, or one for each of 1 kv heads",
    ),
    (mla_attention, {"out": ones(TOKENS, HEADS, 5)}, ValueError, "out: found shape (5, 4, 5), expected (5, 4, 6)"),
    (mla_attention, {"sinks": ones(1)}, ValueError, "sinks: found 1 entries, expected one for each of 4 query heads"),
    (
        mla_attention_decompressed,
        {"w_uk": ones(HEADS, RANK, NOPE)},
        ValueError,
        "w_uk: found shape (4, 6, 3), expected (4, 3, kv_lora_rank) as q_nope has it",
    ),
    (
        mla_attention_decompressed,
        {"w_uv": ones(HEADS, SIZE_V, RANK + 1)},
        ValueError,
        "w_uv: found shape (4, 7, 7), expected (4, v_head_dim, 6) as w_uk has it",
    ),
    (
        mla_attention_decompressed,
        {"w_uk": ones(HEADS, NOPE, RANK).bfloat16()},
        TypeError,
        "w_uk: found torch.bfloat16, expected float32",
    ),
    (
        mla_attention_decompressed,
        {"w_uk": ones(HEADS, NOPE, 4), "w_uv": ones(HEADS, SIZE_V, 4)},
        ValueError,
        "latent_cache: found rows of 8, expected 4 (kv_lora_rank, from w_uk) + 2 (q_pe)",
    ),
    (
        mla_attention_decompressed,
        {"out": ones(TOKENS, HEADS, RANK)},
        ValueError,
        "out: found shape (5, 4, 6), expected (5, 4, 7)",
    ),
]


@pytest.mark.parametrize("row", [(attention, *row) for row in BAD_ATTENTION] + BAD_MLA, ids=lambda row: row[3])
def test_tensors(row: Row) -> None:
    check(row, validate=False)
