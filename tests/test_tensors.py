"""A case's tensors: the same bits everywhere, laid out as asked, and the same data however they are laid out."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from pageproof import reference
from pageproof.oracle.building import pinned
from pageproof.oracle.building.guards import extent
from pageproof.oracle.building.layouts import cache_layouts
from pageproof.oracle.building.tensors import Problem, build
from pageproof.oracle.case import (
    CACHE_LAYOUTS,
    DTYPES,
    FLOAT8,
    MLA_CACHE_LAYOUTS,
    OPERATIONS,
    BatchShape,
    Case,
    Spec,
)
from pageproof.oracle.strategies import cases

BATCH = BatchShape(query_lens=(1, 9, 0, 4), seq_lens=(50, 9, 0, 37), padding_tokens=2, table_slack=2, shared_blocks=2)
SIZES: dict[str, dict[str, Any]] = {
    "attention": {"head_size": 32, "head_size_v": 48},
    "mla_attention": {"num_kv_heads": 1, "group_size": 3, "head_size": 32, "rope_head_size": 16},
    "mla_attention_decompressed": {
        "num_kv_heads": 1,
        "group_size": 3,
        "head_size": 32,
        "head_size_v": 24,
        "rope_head_size": 16,
        "nope_head_size": 8,
    },
    "update_kv_cache": {"head_size": 32, "head_size_v": 48},
    "update_mla_cache": {"num_kv_heads": 1, "head_size": 32, "rope_head_size": 16},
    "merge_states": {"head_size": 32},
}


def make(operation: str = "attention", **changes: Any) -> Case:
    return Case(spec=Spec(operation=operation, block_size=8, **{**SIZES[operation], **changes}), batch=BATCH, seed=7)


def answer(problem: Problem) -> tuple[Tensor, ...]:
    """What the reference makes of it: (out, lse), or the pools."""
    returned = getattr(reference, problem.case.spec.operation)(**problem.arguments, validate=True)
    return returned or tuple(problem.outputs.values())


@pytest.mark.gpu
@settings(max_examples=200)
@given(cases())
def test_any_case_has_the_same_bits_on_a_gpu(case: Case) -> None:
    assert pinned.digests(build(case, "cuda")) == pinned.digests(build(case, "cpu"))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_building_does_not_wait_for_the_gpu(operation: str) -> None:
    build(make(operation), "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        build(make(operation), "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_far_pages_hold_what_near_ones_do(layout: str) -> None:
    near, far = (build(make(cache_layout=layout, far_pages=far), "cuda") for far in (False, True))
    cache = far.arguments["k_cache"]
    assert extent(cache.shape, cache.stride()) > 2**31
    assert pinned.digests(near) == pinned.digests(far)
    assert all(torch.equal(one, other) for one, other in zip(answer(near), answer(far), strict=True))
    assert far.guards.violations() is None


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("halves", CACHE_LAYOUTS)
def test_far_pages_lie_past_int32(halves: str, odd: bool) -> None:
    case = make(cache_layout=halves, far_pages=True, odd_strides=odd, num_kv_heads=3)
    for layout in itertools.chain(*cache_layouts(case, 12, (32, 48))):
        starts = np.array([np.dot(index, layout.strides[:3]) for index in np.ndindex(12, 8, 3)])
        assert (starts >= 2**31).mean() > 0.25
        assert 2**31 < layout.end < 2**32


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_case_is_built_the_same_twice(operation: str) -> None:
    assert pinned.digests(build(make(operation))) == pinned.digests(build(make(operation)))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_dtypes_are_those_of_the_contract(operation: str, dtype: str) -> None:
    case = make(operation, dtype=dtype)
    spec, tokens, arguments = case.spec, case.batch.num_tokens, build(case).arguments
    heads, rank, rope = spec.num_query_heads, spec.head_size, spec.rope_head_size
    blocks = next((a.shape[0] for name, a in arguments.items() if name.endswith("cache")), 0)
    shapes = {
        "q": (tokens, heads, 32),
        "k_cache": (blocks, 8, 2, 32),
        "v_cache": (blocks, 8, 2, 48),
        "key": (tokens, 2, 32),
        "value": (tokens, 2, 48),
        "q_nope": (tokens, heads, 8 if operation.endswith("decompressed") else rank),
        "q_pe": (tokens, heads, rope),
        "latent_cache": (blocks, 8, rank + rope),
        "w_uk": (heads, 8, rank),
        "w_uv": (heads, 24, rank),
        "latent": (tokens, rank),
        "k_pe": (tokens, rope),
        "out": (tokens, heads, {"attention": 48, "mla_attention": rank}.get(operation, 24)),
        "out_a": (tokens, heads, 32),
        "out_b": (tokens, heads, 32),
        "lse": (tokens, heads),
        "lse_a": (tokens, heads),
        "lse_b": (tokens, heads),
        "slot_mapping": (sum(case.batch.query_lens),),
    }
    for name, tensor in arguments.items():
        if isinstance(tensor, Tensor):
            assert tensor.shape == shapes[name], name
            expected = {"l": "float32"}.get(name[0] if name.startswith("lse") else "", dtype)
            assert tensor.dtype == getattr(torch, "int64" if name == "slot_mapping" else expected), name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_layout_changes_nothing_but_the_layout(operation: str) -> None:
    plain = make(operation)
    layouts = MLA_CACHE_LAYOUTS if plain.spec.is_mla else CACHE_LAYOUTS
    changes = [{"cache_layout": layout, "odd_strides": odd} for layout in layouts for odd in (False, True)]
    expected = written(build(plain))
    for change in changes:
        found = written(build(plain.with_spec(**change)))
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True)), change


def written(problem: Problem) -> tuple[Tensor, ...]:
    """The reference's answer; of pools, whose other bytes are random, only the slots that are written."""
    found = answer(problem)
    if not problem.case.spec.operation.startswith("update"):
        return found
    slots = problem.arguments["slot_mapping"]
    slots = slots[slots >= 0]
    return tuple(pool[slots // pool.shape[1], slots % pool.shape[1]] for pool in found)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_odd_strides_are_odd_and_do_not_overlap(operation: str, layout: str) -> None:
    if Spec(operation=operation).is_mla and layout not in MLA_CACHE_LAYOUTS:
        layout = "NHD"
    problem = build(make(operation, odd_strides=True, cache_layout=layout))
    for name, tensor in problem.arguments.items():
        if not isinstance(tensor, Tensor) or name == "slot_mapping":
            continue
        assert not tensor.is_contiguous(), name
        assert (tensor.stride(-1) == 1) == (layout != "transposed" or not name.endswith("cache"))
        places = sum(
            torch.arange(size).view(-1, *[1] * (tensor.dim() - dim - 1)) * tensor.stride(dim)
            for dim, size in enumerate(tensor.shape)
        )
        assert isinstance(places, Tensor)
        assert places.unique().numel() == tensor.numel(), name
    misaligned = {"attention": ["out", "v_cache"], "update_kv_cache": ["value", "v_cache"], "merge_states": ["out_b"]}
    for name in misaligned.get(operation, []):
        assert any(stride % 16 for stride in problem.arguments[name].stride()[:-1]) or layout == "interleaved", name


ALONE = BatchShape(query_lens=(1,), seq_lens=(1,), spare_blocks=False)


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_dimension_of_one_may_have_any_stride(operation: str, layout: str) -> None:
    """One token, one request, one kv head, one page with one slot: no stride but the last means anything."""
    if Spec(operation=operation).is_mla and layout not in MLA_CACHE_LAYOUTS:
        layout = "NHD"
    case = make(operation, odd_strides=True, num_kv_heads=1, group_size=1, cache_layout=layout).with_spec(block_size=1)
    if operation.endswith("attention"):
        case = case.with_spec(query_bias="chain", bias_width=2)
    arguments = build(replace(case, batch=ALONE)).arguments
    tensors = {name: tensor for name, tensor in arguments.items() if isinstance(tensor, Tensor)}
    if "batch" in arguments:
        tensors |= {"block_table": arguments["batch"].block_table}
    if operation.endswith("attention"):
        tensors |= {"query_bias": arguments["rules"].query_bias}
    for name, tensor in tensors.items():
        if name not in ("slot_mapping", "w_uk", "w_uv"):
            assert min(tensor.stride()[:-1]) > 10**6, name
            assert max(tensor.shape[:-1]) == 1, name


@pytest.mark.parametrize("kind", ["tensor", "head"])
@pytest.mark.parametrize("seed", range(6))
def test_scales_are_told_apart(kind: str, seed: int) -> None:
    spec = make(q_dtype=FLOAT8, kv_dtype=FLOAT8, out_dtype=FLOAT8, scales=kind, num_kv_heads=3).spec
    scales = build(Case(spec=spec, batch=BATCH, seed=seed)).arguments["scales"]
    values = [value for name in ("q", "k", "v", "out") for value in getattr(scales, name).flatten().tolist()]
    assert len(values) == (12 if kind == "head" else 4)
    assert len(set(values)) == len(values)
    assert not any(float(np.log2(value)).is_integer() for value in values)


def test_scales_are_only_for_float8() -> None:
    assert build(make(kv_dtype=FLOAT8)).arguments["scales"] is None
    kv_only = build(make(kv_dtype=FLOAT8, scales="tensor")).arguments["scales"]
    assert kv_only.q is None
    assert kv_only.out is None
    mla = build(make("mla_attention", kv_dtype=FLOAT8, scales="tensor")).arguments["scales"]
    assert mla.v is None


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "batch",
    [
        BatchShape(),
        BatchShape(padding_tokens=2),
        BatchShape(query_lens=(0, 0), seq_lens=(0, 0), table_slack=1),
        BatchShape(query_lens=(3,), seq_lens=(0,)),
        BatchShape(query_lens=(0,), seq_lens=(9,), padding_tokens=1),
        BatchShape(query_lens=(9,), seq_lens=(4,)),
    ],
    ids=["no request", "padding only", "padding requests", "no keys", "no queries", "more queries than keys"],
)
def test_what_is_nearly_nothing_is_built_too(operation: str, batch: BatchShape) -> None:
    for odd in (False, True):
        problem = build(replace(make(operation, odd_strides=odd), batch=batch))
        answer(problem)
        assert problem.guards.violations() is None


@settings(max_examples=100)
@given(cases())
def test_the_reference_takes_every_case_and_answers_without_nan(case: Case) -> None:
    problem = build(case)
    found = answer(problem)
    assert problem.guards.violations() is None
    if not case.spec.operation.startswith("update"):
        assert not any(tensor.isnan().any() for tensor in found)


def test_an_odd_table_has_rows_further_apart_than_they_are_wide() -> None:
    table = build(make(odd_strides=True)).arguments["batch"].block_table
    assert table.stride() == (table.shape[1] + 3, 1)
    assert torch.equal(table, build(make()).arguments["batch"].block_table)
