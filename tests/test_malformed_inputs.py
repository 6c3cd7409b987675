"""Batches, rules and scales that no operation takes: one error each, its message word for word."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pageproof import reference
from pageproof.reference import Scales
from pageproof.reference.validation import KERNEL_DTYPES, check_attention

from .malformed_arguments import (
    BLOCK_SIZE,
    BLOCKS,
    HEADS,
    PACKAGES,
    SIZE,
    TOKENS,
    Changes,
    attention,
    call,
    check,
    int32,
    merge_states,
    meta,
    mla_attention,
    mla_attention_decompressed,
    ones,
    update_kv_cache,
    update_mla_cache,
)

BAD_GROUPS: list[tuple[Changes, type[Exception], str]] = [
    ({"batch": None}, TypeError, "batch: found NoneType, expected a Batch"),
    ({"rules": {}}, TypeError, "rules: found dict, expected Rules"),
    ({"scales": 1.0}, TypeError, "scales: found float, expected Scales or None"),
    ({"cu_seqlens_q": [0, 3, 5]}, TypeError, "cu_seqlens_q: found list, expected a torch.Tensor"),
    ({"cu_seqlens_q": torch.tensor([0, 3, 5])}, TypeError, "cu_seqlens_q: found torch.int64, expected int32"),
    (
        {"cu_seqlens_q": int32(0, 3)},
        ValueError,
        "cu_seqlens_q: found shape (2,), expected (3,): one more than seq_lens",
    ),
    (
        {"cu_seqlens_q": int32(0, 9, 3, 9, 5)[::2]},
        ValueError,
        "cu_seqlens_q: found stride 2, expected a contiguous tensor",
    ),
    (
        {"cu_seqlens_q": meta(3, dtype=torch.int32)},
        ValueError,
        "cu_seqlens_q: found a tensor on meta, expected one on cpu like the other arguments",
    ),
    ({"seq_lens": torch.tensor([9.0, 2.0])}, TypeError, "seq_lens: found torch.float32, expected int32"),
    ({"seq_lens": int32(9, 2)[:, None]}, ValueError, "seq_lens: found shape (2, 1), expected 1 dimension"),
    ({"seq_lens": int32(9, 0, 2, 0)[::2]}, ValueError, "seq_lens: found stride 2, expected a contiguous tensor"),
    ({"block_table": torch.zeros(2, 3).long()}, TypeError, "block_table: found torch.int64, expected int32"),
    ({"block_table": int32(0, 1, 2)}, ValueError, "block_table: found shape (3,), expected 2 dimensions"),
    (
        {"block_table": int32(0, 1, 2)[None]},
        ValueError,
        "block_table: found shape (1, 3), expected (2, max_blocks): a row for each of seq_lens",
    ),
    (
        {"block_table": torch.zeros(3, 2, dtype=torch.int32).T},
        ValueError,
        "block_table: found strides (1, 2), expected a last dimension with stride 1",
    ),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale: found str '1', expected a number"),
    ({"softmax_scale": None}, TypeError, "softmax_scale: found NoneType None, expected a number"),
    (
        {"softmax_scale": 1e39},
        ValueError,
        "softmax_scale: found 1e+39, expected a finite number that float32 holds",
    ),
    (
        {"softmax_scale": float("nan")},
        ValueError,
        "softmax_scale: found nan, expected a finite number that float32 holds",
    ),
    ({"causal": 1}, TypeError, "causal: found int 1, expected a bool"),
    (
        {"sliding_window": 0},
        ValueError,
        "sliding_window: found 0, expected an int32 of at least 1; None means no window",
    ),
    (
        {"sliding_window": -1},
        ValueError,
        "sliding_window: found -1, expected an int32 of at least 1; None means no window",
    ),
    ({"sliding_window": 4.0}, TypeError, "sliding_window: found float 4.0, expected an int or None"),
    ({"sliding_window": True}, TypeError, "sliding_window: found bool True, expected an int or None"),
    (
        {"sliding_window": 2**31},
        ValueError,
        "sliding_window: found 2147483648, expected an int32 of at least 1; None means no window",
    ),
    (
        {"right_window": -1, "causal": False},
        ValueError,
        "right_window: found -1, expected an int32 of at least 0; None means no window",
    ),
    (
        {"right_window": 2},
        ValueError,
        "right_window: found 2, expected None beside causal=True, which ends at the token",
    ),
    ({"softcap": 0}, ValueError, "softcap: found 0, expected a positive number; None means no softcap"),
    ({"softcap": -30.0}, ValueError, "softcap: found -30.0, expected a positive number; None means no softcap"),
    ({"softcap": float("inf")}, ValueError, "softcap: found inf, expected a finite number that float32 holds"),
    ({"softcap": ones(1)}, TypeError, "softcap: found Tensor tensor([1.]), expected a number"),
    ({"alibi_slopes": ones(3)}, ValueError, "alibi_slopes: found 3 entries, expected one for each of 4 query heads"),
    ({"alibi_slopes": ones(4).double()}, TypeError, "alibi_slopes: found torch.float64, expected float32"),
    ({"alibi_slopes": ones(1, 4)}, ValueError, "alibi_slopes: found shape (1, 4), expected 1 dimension"),
    ({"sinks": ones(2)}, ValueError, "sinks: found 2 entries, expected one for each of 4 query heads"),
    ({"sinks": ones(4).half()}, TypeError, "sinks: found torch.float16, expected float32"),
    ({"sinks": ones(8)[::2]}, ValueError, "sinks: found strides (2,), expected a last dimension with stride 1"),
    ({"sinks": meta(4)}, ValueError, "sinks: found a tensor on meta, expected one on cpu like the other arguments"),
    ({"query_bias": ones(3, 3)}, ValueError, "query_bias: found 3 rows, expected one for each of 5 tokens"),
    ({"query_bias": ones(5)}, ValueError, "query_bias: found shape (5,), expected 2 dimensions"),
    ({"query_bias": ones(5, 3).bool()}, TypeError, "query_bias: found torch.bool, expected float32"),
    (
        {"query_bias": ones(3, 5).T},
        ValueError,
        "query_bias: found strides (1, 5), expected a last dimension with stride 1",
    ),
]

BAD_SCALES: list[tuple[Changes, type[Exception], str]] = [
    ({"k": 0.5}, TypeError, "scales.k: found float, expected a torch.Tensor"),
    ({"v": ones(1).double()}, TypeError, "scales.v: found torch.float64, expected float32"),
    ({"q": ones(2, 1)}, ValueError, "scales.q: found shape (2, 1), expected one element, or [num_kv_heads]"),
    ({"out": ones(0)}, ValueError, "scales.out: found shape (0,), expected one element, or [num_kv_heads]"),
    ({"k": ones(4)[::2]}, ValueError, "scales.k: found stride 2, expected a contiguous tensor"),
]


@pytest.mark.parametrize("make", [attention, mla_attention, mla_attention_decompressed])
@pytest.mark.parametrize(
    ("changes", "kind", "message"), BAD_GROUPS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_groups(make: Callable[[], Changes], changes: Changes, kind: type[Exception], message: str) -> None:
    check((make, changes, kind, message), validate=False)


@pytest.mark.parametrize(("changes", "kind", "message"), BAD_SCALES)
def test_scales_as_they_are_made(changes: Changes, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        Scales(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "make",
    [attention, mla_attention, mla_attention_decompressed, update_kv_cache, update_mla_cache, merge_states],
)
def test_the_unchanged_arguments_are_fine(make: Callable[[], Changes]) -> None:
    """So each error above is due to its one change."""
    for package in PACKAGES:
        call(make, {}, validate=True, package=package)


def test_the_kernels_take_no_float64() -> None:
    with pytest.raises(TypeError, match=r"^q: found torch\.float64, expected float32 or float16 or bfloat16 or float8"):
        check_attention(**attention() | {"q": ones(TOKENS, HEADS, SIZE).double()}, dtypes=KERNEL_DTYPES)
    with pytest.raises(TypeError, match=r"lse: found torch\.float64, expected float32$"):
        check_attention(**attention(), lse=ones(TOKENS, HEADS).double(), dtypes=KERNEL_DTYPES)


def test_dimensions_of_one_may_carry_any_stride() -> None:
    arguments = attention()
    strange = torch.as_strided(ones(TOKENS * 32), (TOKENS, HEADS, 1), (32, 8, 77))
    cache = torch.as_strided(ones(192), (BLOCKS, BLOCK_SIZE, 1, 1), (4, 1, 0, 99))
    arguments |= {"q": strange, "k_cache": cache, "v_cache": cache, "out": strange.clone()}
    reference.attention(**arguments)
    rows = torch.as_strided(ones(5), (TOKENS, 1, 1), (1, 0, 5))
    reference.update_kv_cache(rows, rows, cache, cache, torch.arange(TOKENS))
