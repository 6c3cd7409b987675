"""Values in device memory that make no sense, looked at under `validate`: one error each, word for word."""

from __future__ import annotations

import pytest
import torch

from pageproof.reference import Scales

from .malformed_arguments import (
    BLOCK_SIZE,
    FLOAT8,
    HEADS,
    KV_HEADS,
    SIZE,
    TOKENS,
    Row,
    attention,
    check,
    int32,
    merge_states,
    mla_attention,
    mla_attention_decompressed,
    ones,
    update_kv_cache,
    update_mla_cache,
)

NAN, INF = float("nan"), float("inf")
BAD_VALUES: list[Row] = [
    (attention, {"cu_seqlens_q": int32(1, 3, 5)}, ValueError, "cu_seqlens_q: found 1 as its first entry, expected 0"),
    (
        attention,
        {"cu_seqlens_q": int32(0, 5, 3)},
        ValueError,
        "cu_seqlens_q: found 3 after 5 at request 1, expected entries that never fall",
    ),
    (
        attention,
        {"cu_seqlens_q": int32(0, 3, 6)},
        ValueError,
        "cu_seqlens_q: found 6 as its last entry, expected at most num_tokens = 5",
    ),
    (
        attention,
        {"seq_lens": int32(9, -2)},
        ValueError,
        "seq_lens: found -2 at request 1, expected a length of at least 0",
    ),
    (
        attention,
        {"seq_lens": int32(13, 2)},
        ValueError,
        "block_table: found 3 columns, expected at least 4 for request 0 (seq_len 13, block_size 4)",
    ),
    (
        attention,
        {"seq_lens": int32(2**31 - 1, 2)},
        ValueError,
        "block_table: found 3 columns, expected at least 536870912 for request 0 (seq_len 2147483647, block_size 4)",
    ),
    (
        attention,
        {"seq_lens": int32(13, 2), "query_bias": torch.zeros(TOKENS, 3)},
        ValueError,
        "block_table: found 3 columns, expected at least 4 for request 0",
    ),
    (
        attention,
        {"block_table": torch.tensor([[0, 6, 2], [3, -1, -1]], dtype=torch.int32)},
        ValueError,
        "block_table: found page 6 at [0, 1], expected 0 <= page < 6",
    ),
    (
        attention,
        {"block_table": torch.tensor([[0, 1, 2], [-1, 3, 3]], dtype=torch.int32)},
        ValueError,
        "block_table: found page -1 at [1, 0], expected 0 <= page < 6",
    ),
    (
        attention,
        {"k_cache": ones(0, BLOCK_SIZE, KV_HEADS, SIZE), "v_cache": ones(0, BLOCK_SIZE, KV_HEADS, SIZE)},
        ValueError,
        "block_table: found page 3 at [1, 0], expected 0 <= page < 0",
    ),
    (
        attention,
        {"query_bias": torch.tensor([[0.0], [NAN], [0.0], [0.0], [0.0]])},
        ValueError,
        "query_bias: found nan at [1, 0], expected finite numbers or -inf",
    ),
    (
        attention,
        {"query_bias": torch.tensor([[0.0], [0.0], [0.0], [0.0], [INF]])},
        ValueError,
        "query_bias: found inf at [4, 0], expected finite numbers or -inf",
    ),
    (
        attention,
        {"sinks": torch.tensor([0.0, NAN, INF, -INF])},
        ValueError,
        "sinks: found NaN, expected finite numbers, -inf or inf",
    ),
    (
        attention,
        {"alibi_slopes": torch.tensor([0.0, 1.0, INF, 2.0])},
        ValueError,
        "alibi_slopes: found NaN or inf, expected finite numbers",
    ),
    (
        attention,
        {"out": ones(TOKENS, HEADS, SIZE).to(FLOAT8), "scales": Scales(out=torch.tensor([0.5, 0.0]))},
        ValueError,
        "scales.out: found [0.5, 0.0], expected finite positive numbers",
    ),
    (
        mla_attention,
        {"block_table": torch.tensor([[0, 1, 9], [3, -1, -1]], dtype=torch.int32)},
        ValueError,
        "block_table: found page 9 at [0, 2], expected 0 <= page < 6",
    ),
    (
        mla_attention_decompressed,
        {"seq_lens": int32(-1, 2)},
        ValueError,
        "seq_lens: found -1 at request 0, expected a length of at least 0",
    ),
    (
        update_kv_cache,
        {"slot_mapping": torch.tensor([0, -1, 24, 3, 4])},
        ValueError,
        "slot_mapping: found slot 24, expected less than num_blocks * block_size = 24",
    ),
    (
        update_kv_cache,
        {"slot_mapping": torch.tensor([7, -1, -1, 3, 7])},
        ValueError,
        "slot_mapping: found slot 7 twice, expected every slot at most once",
    ),
    (
        update_mla_cache,
        {"slot_mapping": torch.tensor([0, 1, 2, 99, 4])},
        ValueError,
        "slot_mapping: found slot 99, expected less than num_blocks * block_size = 24",
    ),
    (
        merge_states,
        {"lse_b": torch.full((TOKENS, HEADS), NAN)},
        ValueError,
        "lse_b: found NaN, expected a finite number, -inf or inf",
    ),
]


@pytest.mark.parametrize("row", BAD_VALUES, ids=lambda row: row[3])
def test_values(row: Row) -> None:
    check(row, validate=True)
