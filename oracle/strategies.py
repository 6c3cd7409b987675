"""Hypothesis strategies for the same cases that a campaign draws, small enough for an interpreted kernel.

Everything shrinks towards a plain case: one request of one token, float32, every feature off. A case that
Hypothesis finds is an ordinary `Case`: its JSON replays anywhere, and without Hypothesis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from .case import (
    ATTENTION_OPERATIONS,
    CACHE_LAYOUTS,
    DTYPES,
    FLOAT8,
    MLA_CACHE_LAYOUTS,
    OPERATIONS,
    QUERY_BIASES,
    RECIPES,
    SCALE_KINDS,
    BatchShape,
    Case,
    Spec,
)

LARGEST_KEYS = 80  # of one request
LARGEST_QUERY = 20
_TILES = (16, 32, 64)


@st.composite
def specs(draw: DrawFn, operations: Sequence[str] = OPERATIONS) -> Spec:
    """Any operation of these with any of its features, each on or off; sizes that take milliseconds."""
    operation = draw(st.sampled_from(operations))
    spec = Spec(
        operation=operation,
        dtype=draw(st.sampled_from(DTYPES)),
        num_kv_heads=draw(st.sampled_from((1, 2, 3))),
        group_size=draw(st.sampled_from((1, 2, 3, 5, 8))),
        head_size=draw(st.sampled_from((16, 32, 48, 64, 80))),
        block_size=draw(st.sampled_from((16, 8, 1, 4, 32, 24))),
        odd_strides=draw(st.booleans()),
    )
    spec = replace(spec, head_size_v=draw(st.sampled_from((spec.head_size, 16, 32, 48))))
    if spec.is_mla:
        nope = draw(st.sampled_from((16, 32))) if operation == "mla_attention_decompressed" else 0
        spec = replace(spec, num_kv_heads=1, rope_head_size=draw(st.sampled_from((16, 8))), nope_head_size=nope)
    if operation == "merge_states":
        return replace(spec, head_size_v=spec.head_size, block_size=16)
    spec = replace(spec, cache_layout=draw(st.sampled_from(MLA_CACHE_LAYOUTS if spec.is_mla else CACHE_LAYOUTS)))
    spec = draw(_with_formats(spec))
    return draw(_with_rules(spec)) if operation in ATTENTION_OPERATIONS else spec


@st.composite
def _with_formats(draw: DrawFn, spec: Spec) -> Spec:
    """float8 here and there, with scales or without."""
    attends = spec.operation in ATTENTION_OPERATIONS
    kv_dtype = draw(st.sampled_from(("", FLOAT8)))
    q_dtype = draw(st.sampled_from(("", FLOAT8))) if attends and kv_dtype else ""
    out_dtype = draw(st.sampled_from(("", "", FLOAT8))) if attends else ""
    scales = draw(st.sampled_from(SCALE_KINDS)) if kv_dtype or out_dtype else "none"
    return replace(spec, kv_dtype=kv_dtype, q_dtype=q_dtype, out_dtype=out_dtype, scales=scales)


@st.composite
def _with_rules(draw: DrawFn, spec: Spec) -> Spec:
    page = spec.block_size
    windows = st.sampled_from((1, 2, max(1, page - 1), page, page + 1, 31, 32, 33)) | st.integers(1, LARGEST_KEYS + 1)
    causal = draw(st.sampled_from((True, False)))
    query_bias = draw(st.sampled_from(QUERY_BIASES))
    return replace(
        spec,
        causal=causal,
        sliding_window=draw(st.none() | windows),
        right_window=None if causal else draw(st.none() | st.sampled_from((0, 1, page)) | st.integers(0, LARGEST_KEYS)),
        softcap=draw(st.none() | st.sampled_from((30.0, 1.0))),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
        query_bias=query_bias,
        bias_width=0 if query_bias == "none" else draw(st.integers(1, LARGEST_QUERY + 2)),
    )


@st.composite
def batches(draw: DrawFn, block_size: int = 16, sliding_window: int | None = None, requests: int = 4) -> BatchShape:
    """Decode, prefill, chunks, speculation, padding and their mixtures, lengths at the edges of pages and windows."""
    edges = {1, 2, *_TILES, *(tile + 1 for tile in _TILES), block_size - 1, block_size, block_size + 1, 2 * block_size}
    if sliding_window is not None:
        edges |= {sliding_window - 1, sliding_window, sliding_window + 1}
    keys = st.integers(0, LARGEST_KEYS) | st.sampled_from(sorted(edge for edge in edges if 0 < edge <= LARGEST_KEYS))
    lengths = [draw(_request(keys)) for _ in range(draw(st.integers(0, requests)))]
    return BatchShape(
        query_lens=tuple(query_len for query_len, _ in lengths),
        seq_lens=tuple(seq_len for _, seq_len in lengths),
        padding_tokens=draw(st.sampled_from((0, 0, 1, 3))),
        table_slack=draw(st.sampled_from((0, 0, 1, 2))),
        shared_blocks=draw(st.sampled_from((0, 0, 1, 2))),
        repeated_blocks=draw(st.booleans()),
        spare_blocks=not draw(st.booleans()),
    )


@st.composite
def _request(draw: DrawFn, keys: SearchStrategy[int]) -> tuple[int, int]:
    """(query_len, seq_len): more queries than keys are valid, and rare."""
    kind = draw(st.sampled_from(("decode", "chunk", "prefill", "speculative", "padding", "overhang")))
    seq_len = draw(keys)
    if kind == "padding":
        return 0, 0
    if kind == "overhang":
        return draw(st.integers(1, LARGEST_QUERY)), seq_len
    longest = {"decode": 1, "speculative": 8}.get(kind, LARGEST_QUERY)
    if kind == "prefill":
        seq_len = min(seq_len, LARGEST_QUERY)
        return seq_len, seq_len
    return draw(st.integers(min(1, seq_len), min(longest, seq_len))), seq_len


@st.composite
def cases(
    draw: DrawFn, operations: Sequence[str] = OPERATIONS, recipes: Sequence[str] = RECIPES, requests: int = 4
) -> Case:
    """A valid case with all poison, compared in full when it is judged."""
    spec = draw(specs(operations))
    return Case(
        spec=spec,
        batch=draw(batches(spec.block_size, spec.sliding_window, requests)),
        recipe=draw(st.sampled_from(tuple(recipes))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
