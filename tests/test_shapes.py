"""The kernels agree with the reference at every size, layout and length that the contract names.

Campaigns draw these at random; here each comes up for certain, on a CPU and on a GPU.
"""

from __future__ import annotations

import fcntl
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pageproof.oracle import BatchShape, Case, Spec, judge
from pageproof.oracle.adapters import find
from pageproof.oracle.case import CACHE_LAYOUTS, FLOAT8, MLA_CACHE_LAYOUTS
from pageproof.oracle.case_rules import why_invalid

MIXED = BatchShape(query_lens=(1, 18, 3, 0), seq_lens=(40, 18, 66, 0), padding_tokens=2, table_slack=1)
TINY = BatchShape(query_lens=(1, 2, 1), seq_lens=(35, 2, 1), repeated_blocks=True)
MLA: dict[str, Any] = {"num_kv_heads": 1, "group_size": 3, "head_size": 64, "rope_head_size": 16, "block_size": 8}
ABSORBED = MLA | {"operation": "mla_attention"}
PROJECTED = MLA | {"operation": "mla_attention_decompressed", "nope_head_size": 24, "head_size_v": 48}
ALL_FLOAT8: dict[str, Any] = {"q_dtype": FLOAT8, "kv_dtype": FLOAT8, "out_dtype": FLOAT8}


def agree(case: Case, device: torch.device) -> None:
    assert why_invalid(case) is None
    judge(case, find("ours"), device).require()


# head_size, head_size_v, block_size, group_size
SIZES = [
    (16, 16, 1, 1),
    (24, 40, 8, 3),
    (72, 24, 16, 5),
    (80, 96, 32, 7),
    (96, 80, 48, 12),
    (112, 112, 64, 16),
    (128, 64, 128, 2),
    (192, 128, 256, 1),
    (256, 256, 544, 3),
    (64, 192, 16, 71),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_heads_pages_and_groups_of_any_size(sizes: tuple[int, ...], dtype: str, pageproof_device: torch.device) -> None:
    names = ("head_size", "head_size_v", "block_size", "group_size")
    spec = Spec(dtype=dtype, num_kv_heads=1, **dict(zip(names, sizes, strict=True)))
    agree(Case(spec=spec, batch=TINY, recipe="needle", seed=1), pageproof_device)


# kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim
LATENT_SIZES = [(512, 64, 128, 128), (256, 32, 64, 96), (80, 24, 48, 40)]


@pytest.mark.parametrize("kv_dtype", ["", FLOAT8])
@pytest.mark.parametrize("operation", ["mla_attention", "mla_attention_decompressed"])
@pytest.mark.parametrize("sizes", LATENT_SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_latent_rows_of_any_size(
    sizes: tuple[int, ...], operation: str, kv_dtype: str, pageproof_device: torch.device
) -> None:
    rank, rope, nope, value = sizes
    absorbed = operation == "mla_attention"
    rest = {} if absorbed else {"nope_head_size": nope, "head_size_v": value}
    spec = Spec(**MLA | {"head_size": rank, "rope_head_size": rope}, operation=operation, kv_dtype=kv_dtype, **rest)
    agree(Case(spec=spec, batch=TINY, seed=2), pageproof_device)


@pytest.mark.parametrize("odd_strides", [False, True])
@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
@pytest.mark.parametrize("operation", ["attention", "update_kv_cache"])
def test_caches_of_any_layout(operation: str, layout: str, odd_strides: bool, pageproof_device: torch.device) -> None:
    spec = Spec(operation=operation, dtype="float16", head_size=32, head_size_v=48, block_size=8)
    case = Case(spec=spec, batch=MIXED, recipe="needle", seed=3)
    agree(case.with_spec(cache_layout=layout, odd_strides=odd_strides), pageproof_device)


@pytest.mark.parametrize("odd_strides", [False, True])
@pytest.mark.parametrize("layout", MLA_CACHE_LAYOUTS)
@pytest.mark.parametrize("spec", [ABSORBED, PROJECTED, MLA | {"operation": "update_mla_cache"}], ids=str)
def test_latent_caches_of_any_layout(
    spec: dict[str, Any], layout: str, odd_strides: bool, pageproof_device: torch.device
) -> None:
    case = Case(spec=Spec(**spec, cache_layout=layout, odd_strides=odd_strides), batch=TINY, seed=4)
    agree(case, pageproof_device)


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
@pytest.mark.parametrize("operation", ["attention", "update_kv_cache"])
def test_one_of_everything_with_strides_that_mean_nothing(
    operation: str, layout: str, pageproof_device: torch.device
) -> None:
    spec = Spec(operation=operation, num_kv_heads=1, group_size=1, head_size=16, head_size_v=32, odd_strides=True)
    batch = BatchShape(query_lens=(1,), seq_lens=(1,), spare_blocks=False)
    for block_size in (1, 16):
        case = Case(spec=spec, batch=batch, seed=5).with_spec(cache_layout=layout, block_size=block_size)
        agree(case, pageproof_device)


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130, 131])
def test_windows_at_the_edges_of_tiles_and_lengths(window: int, pageproof_device: torch.device) -> None:
    """The longest request has 130 keys."""
    spec = Spec(dtype="float16", num_kv_heads=1, head_size=16, head_size_v=16, sliding_window=window)
    batch = BatchShape(query_lens=(1, 2, 17), seq_lens=(130, 129, 33))
    agree(Case(spec=spec, batch=batch, recipe="needle", seed=6), pageproof_device)


@pytest.mark.parametrize("query_bias", ["chain", "tree", "deep"])
@pytest.mark.parametrize("causal", [True, False])
def test_one_to_sixteen_tokens_are_verified(query_bias: str, causal: bool, pageproof_device: torch.device) -> None:
    spec = Spec(num_kv_heads=1, group_size=1, head_size=16, head_size_v=16, causal=causal, query_bias=query_bias)
    lengths = tuple(range(1, 17))
    batch = BatchShape(query_lens=lengths, seq_lens=tuple(n + 7 for n in lengths))
    agree(Case(spec=spec, batch=batch, seed=7).with_spec(bias_width=16), pageproof_device)


@pytest.mark.parametrize("scales", ["tensor", "head"])
@pytest.mark.parametrize("spec", [{"num_kv_heads": 3}, ABSORBED, PROJECTED], ids=["attention", "absorbed", "projected"])
def test_every_float8_tensor_has_a_scale_of_its_own(
    spec: dict[str, Any], scales: str, pageproof_device: torch.device
) -> None:
    for recipe in ("normal", "needle"):
        case = Case(spec=Spec(**spec, **ALL_FLOAT8, scales=scales), batch=TINY, recipe=recipe, seed=8)
        agree(case, pageproof_device)


def test_lengths_of_nothing_one_and_very_many(pageproof_device: torch.device) -> None:
    longest = 131072 if pageproof_device.type == "cuda" else 2048
    spec = Spec(num_kv_heads=1, group_size=1, head_size=32, head_size_v=32, block_size=16)
    batch = BatchShape(query_lens=(0, 1, 1, 2, 1), seq_lens=(0, 1, longest, 0, 17), padding_tokens=1)
    agree(Case(spec=spec, batch=batch, recipe="needle", seed=9), pageproof_device)


def crowd(requests: int, lengths: tuple[int, ...], **spec: Any) -> Case:
    """So many requests, each of one of these numbers of new tokens, and with at most two keys from before."""
    rng = random.Random(0)
    query_lens = tuple(rng.choice(lengths) for _ in range(requests))
    seq_lens = tuple(n + rng.choice((0, 0, 1, 2)) for n in query_lens)
    sizes = {"head_size": 16, "head_size_v": 16, "block_size": 1, **spec}
    return Case(spec=Spec(**sizes), batch=BatchShape(query_lens=query_lens, seq_lens=seq_lens), seed=10)


@pytest.mark.gpu
@pytest.mark.parametrize("requests", [65535, 65536, 65537, 70000])
def test_more_requests_than_sixteen_bits_count(requests: int) -> None:
    agree(crowd(requests, (1,), num_kv_heads=1, group_size=1), torch.device("cuda"))
    agree(crowd(requests, (1,), operation="update_kv_cache", num_kv_heads=1), torch.device("cuda"))


@pytest.mark.gpu
def test_more_tiles_than_sixteen_bits_count() -> None:
    """65,600 at least: 1,025 requests of one tile each for every kv head and every eight query heads."""
    agree(crowd(1025, (17, 18), num_kv_heads=8, group_size=8), torch.device("cuda"))
    agree(crowd(70000, (1, 2, 3), num_kv_heads=2, group_size=1), torch.device("cuda"))


FAR: list[dict[str, Any]] = [
    *({"head_size": 64, "head_size_v": 80, "cache_layout": layout} for layout in CACHE_LAYOUTS),
    *(ABSORBED | {"cache_layout": layout} for layout in MLA_CACHE_LAYOUTS),
    PROJECTED,
    {"operation": "update_kv_cache", "head_size": 64, "head_size_v": 80},
    MLA | {"operation": "update_mla_cache", "cache_layout": "transposed"},
]


@pytest.fixture
def room_for_far_pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One of the workers of a parallel run at a time: such caches take 13 GB."""
    with open(tmp_path_factory.getbasetemp().parent / "far_pages.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.usefixtures("room_for_far_pages")
@pytest.mark.parametrize("odd_strides", [False, True])
@pytest.mark.parametrize("spec", FAR, ids=str)
def test_pages_past_two_to_the_31_elements(spec: dict[str, Any], odd_strides: bool) -> None:
    for seed in range(3):
        case = Case(spec=Spec(**spec, far_pages=True, odd_strides=odd_strides), batch=MIXED, recipe="needle", seed=seed)
        agree(case, torch.device("cuda"))
