"""The fixed cases whose every load and store is looked at: on a CPU by name (test_read_set.py), on a GPU by its tools.

On a GPU (tests/sanitized.py) a split is longer than any of these cases, so that there are some more.
"""

from __future__ import annotations

from dataclasses import replace

from pageproof.oracle import BatchShape, Case, Spec

MIXED = BatchShape(query_lens=(1, 4, 0), seq_lens=(37, 9, 20), padding_tokens=2, table_slack=1)
SMALL = Spec(dtype="float32", num_kv_heads=2, group_size=2, head_size=16, head_size_v=16)
MLA = replace(SMALL, operation="mla_attention", num_kv_heads=1, group_size=3, head_size=32, rope_head_size=16)

FIXED = {
    "mixed": Case(spec=SMALL, batch=MIXED),
    "window": Case(spec=replace(SMALL, sliding_window=5), batch=MIXED),
    "right window": Case(spec=replace(SMALL, causal=False, sliding_window=6, right_window=1), batch=MIXED),
    "one kv head, odd sizes": Case(
        spec=replace(SMALL, num_kv_heads=1, group_size=7, head_size=24, head_size_v=40, odd_strides=True), batch=MIXED
    ),
    "pages of one": Case(spec=replace(SMALL, block_size=1, cache_layout="HND"), batch=MIXED),
    "pages of 48": Case(spec=replace(SMALL, block_size=48, cache_layout="interleaved"), batch=MIXED),
    "shared pages": Case(
        spec=replace(SMALL, block_size=4, sliding_window=12),
        batch=BatchShape(query_lens=(1, 2, 1), seq_lens=(21, 30, 5), shared_blocks=2),
    ),
    "tree": Case(
        spec=replace(SMALL, block_size=4, query_bias="tree", bias_width=5),
        batch=BatchShape(query_lens=(5, 1, 20), seq_lens=(12, 18, 20)),
        seed=26,
    ),
    "dense bias, more tokens than keys": Case(
        spec=replace(SMALL, causal=False, query_bias="dense", bias_width=6),
        batch=BatchShape(query_lens=(7, 3), seq_lens=(4, 0), padding_tokens=1),
        seed=29,
    ),
    "equal lengths": Case(spec=SMALL, batch=BatchShape(query_lens=(1, 1), seq_lens=(20, 20))),
    "splits": Case(spec=SMALL, batch=BatchShape(query_lens=(1, 2, 0), seq_lens=(130, 70, 0), padding_tokens=1)),
    "float8, ALiBi, sinks": Case(
        spec=replace(
            SMALL, dtype="bfloat16", q_dtype="float8_e4m3fn", kv_dtype="float8_e4m3fn", out_dtype="float8_e4m3fn",
            scales="head", alibi=True, sinks=True, softcap=20.0,
        ),
        batch=MIXED,
        recipe="extreme",
    ),
    "prefill": Case(
        spec=replace(SMALL, dtype="float16", group_size=3), batch=BatchShape(query_lens=(33,), seq_lens=(40,))
    ),
    "absorbed": Case(spec=MLA, batch=MIXED),
    "decompressed": Case(
        spec=replace(MLA, operation="mla_attention_decompressed", nope_head_size=16, sliding_window=8), batch=MIXED
    ),
    "no tokens": Case(spec=SMALL, batch=BatchShape(query_lens=(0, 0), seq_lens=(9, 0))),
    "no requests": Case(spec=SMALL, batch=BatchShape(padding_tokens=3)),
    "update": Case(spec=replace(SMALL, operation="update_kv_cache", cache_layout="HND", odd_strides=True), batch=MIXED),
    "float8 update": Case(
        spec=replace(SMALL, operation="update_kv_cache", kv_dtype="float8_e4m3fn", scales="head"), batch=MIXED
    ),
    "latent update": Case(spec=replace(MLA, operation="update_mla_cache"), batch=MIXED),
    "merge": Case(spec=replace(SMALL, operation="merge_states"), batch=MIXED, recipe="extreme"),
}  # fmt: skip

LONG = BatchShape(query_lens=(1, 4, 30, 0), seq_lens=(1300, 300, 530, 20), padding_tokens=2, table_slack=1)

LONGER = (
    {
        "prefill of 16-bit caches": Case(
            spec=replace(
                SMALL, dtype="float16", group_size=3, head_size=64, head_size_v=128, block_size=24, sliding_window=20
            ),
            batch=BatchShape(query_lens=(33, 70, 1), seq_lens=(140, 70, 300), padding_tokens=2),
        ),
    }
    | {
        f"{name}, several splits": replace(FIXED[name], batch=LONG)
        for name in ("mixed", "window", "one kv head, odd sizes", "pages of 48", "absorbed", "decompressed", "merge")
    }
    | {
        "float16, several splits": Case(spec=replace(SMALL, dtype="float16", head_size=64, head_size_v=64), batch=LONG),
        "float8, several splits": Case(
            spec=replace(
                SMALL,
                dtype="bfloat16",
                kv_dtype="float8_e4m3fn",
                scales="head",
                head_size=64,
                head_size_v=64,
                sinks=True,
            ),
            batch=LONG,
        ),
    }
)
