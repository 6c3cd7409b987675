"""Which prefills take the kernel for Hopper: a function of formats, sizes and strides alone, and its tiles fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pageproof.optimized import hopper
from pageproof.optimized.hopper import Form, form_of, hopper_caches, hopper_tile, why_portable
from pageproof.optimized.kernels.arguments import PagedKV, paged_kv
from pageproof.optimized.kernels.hopper.sizes import HopperTile
from pageproof.optimized.shapes import Shape, padded, tiles
from pageproof.optimized.tile_table import ARCHITECTURES, Operands
from pageproof.oracle import BatchShape, Case, Spec
from pageproof.oracle.building.tensors import build
from pageproof.oracle.case import CACHE_LAYOUTS

SHAPE = Shape(
    num_kv_heads=2,
    group=4,
    head_size=128,
    head_size_v=128,
    block_size=16,
    arithmetic=torch.bfloat16,
    architecture="sm_90",
    operands=Operands.LOADED,
)
CACHE = Form(4096, torch.bfloat16, (8, 16, 2, 128), (4096, 256, 128, 1))


def why(shape: Shape = SHAPE, k: Form = CACHE, v: Form = CACHE, **options: Any) -> str | None:
    return why_portable(shape, k, v, **{"has_query_bias": False, "triton_version": "3.6"} | options)


@pytest.mark.parametrize(
    "change",
    [
        {"arithmetic": torch.float16},
        {"head_size": 64, "head_size_v": 64},
        {"head_size": 96, "head_size_v": 80},
        {"head_size": 192},
        {"head_size": 256, "head_size_v": 256},
        {"head_size_v": 33},
        {"group": 1},
        {"group": 71},
        *({"block_size": size} for size in (8, 24, 48, 64, 128, 544)),
    ],
    ids=str,
)
def test_it_takes(change: dict[str, Any]) -> None:
    assert why(replace(SHAPE, **change)) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "sm_100"}, "architecture sm_100"),
        ({"architecture": "interpreter"}, "architecture interpreter"),
        ({"arithmetic": torch.float32}, "16-bit"),
        ({"operands": Operands.COMPUTED}, "16-bit"),
        ({"operands": Operands.LATENT, "rope_size": 64}, "16-bit"),
        ({"rope_size": 64}, "16-bit"),
        ({"head_size": 32}, "head sizes (32, 128)"),
        ({"head_size_v": 272}, "head sizes (128, 272)"),
        ({"block_size": 1}, "pages of 1 slots"),
        ({"block_size": 20}, "pages of 20 slots"),
    ],
    ids=str,
)
def test_it_leaves_to_the_portable_kernel(change: dict[str, Any], words: str) -> None:
    found = why(replace(SHAPE, **change))
    assert found is not None
    assert words in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"address": 4104}, "does not begin on 16 bytes"),
        ({"sizes": (0, 16, 2, 128)}, "has no pages"),
        ({"strides": (4096, 128, 2048, 2)}, "not contiguous"),
        ({"strides": (4096, 260, 128, 1)}, "strides (4096, 260, 128, 1)"),
        ({"strides": (0, 256, 128, 1)}, "strides (0, 256, 128, 1)"),
        ({"strides": (2**39, 256, 128, 1)}, "strides"),
    ],
    ids=str,
)
def test_caches_that_cannot_be_copied_in_boxes(change: dict[str, Any], words: str) -> None:
    odd = CACHE._replace(**change)
    for name in ("k", "v"):
        found = why(**{name: odd})
        assert found is not None
        assert found.startswith(f"{name}_cache")
        assert words in found


def test_a_query_bias_and_an_unknown_triton() -> None:
    assert "query bias" in (why(has_query_bias=True) or "")
    assert why(triton_version="3.7") is None
    assert "Triton 3.5" in (why(triton_version="3.5") or "")


TAKEN = {"NHD", "HND", "interleaved", "head_major", "sliced", "slot_major"}


@pytest.mark.parametrize("odd_strides", [False, True])
@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_the_layouts_that_cases_have(layout: str, odd_strides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd strides of values are no multiples of 16 bytes, but for those that share the padded rows of keys."""
    monkeypatch.setattr(hopper, "why_portable", lambda *rest, **options: why(*rest))
    spec = Spec(head_size=128, head_size_v=128, cache_layout=layout, odd_strides=odd_strides)
    arguments = build(Case(spec=spec, batch=BatchShape(query_lens=(40,), seq_lens=(70,))), "cpu").arguments
    cache = paged_kv(arguments["k_cache"], arguments["v_cache"])
    found = hopper_caches(cache, SHAPE, has_query_bias=False)
    assert (found is not None) is (layout == "interleaved" if odd_strides else layout in TAKEN)


def test_what_no_stride_means_does_not_matter() -> None:
    packed = torch.zeros(1, 16, 1, 128, dtype=torch.bfloat16)
    odd = packed.as_strided(packed.shape, (1_000_003, 128, 1_000_003, 1))
    assert form_of(paged_kv(odd, odd).k).strides == form_of(paged_kv(packed, packed).k).strides


def test_without_values_of_their_own_there_is_nothing_to_copy() -> None:
    latent = paged_kv(*(torch.zeros(2, 16, 1, 128, dtype=torch.bfloat16),) * 2)
    assert hopper_caches(PagedKV(latent.k), SHAPE, has_query_bias=False) is None


@pytest.mark.parametrize("sizes", [(48, 64), (64, 64), (128, 128), (96, 256), (192, 128), (256, 256)], ids=str)
def test_tiles_fit_and_keep_to_the_declared_arithmetic(sizes: tuple[int, int]) -> None:
    shape = replace(SHAPE, head_size=sizes[0], head_size_v=sizes[1])
    tile, (keys, columns) = hopper_tile(shape), map(padded, sizes)
    shared = 2 * (2 * tile.rows * keys + tile.stages * tile.keys * (keys + columns)) + 1024
    assert shared <= ARCHITECTURES["sm_90"].shared_memory
    # The contract that the adapter declares has the fewest keys of a step that any kernel takes: those of decode.
    assert tile.keys >= tiles(shape, prefill=False).block_n


@pytest.mark.parametrize(
    ("block_size", "slots"), [(8, 8), (16, 16), (24, 8), (48, 16), (128, 128), (256, 128), (544, 32)]
)
def test_a_copy_brings_slots_of_one_page(block_size: int, slots: int) -> None:
    tile = hopper_tile(replace(SHAPE, block_size=block_size))
    assert tile.box_slots == slots
    assert tile.keys % tile.box_slots == block_size % tile.box_slots == 0


def test_an_order_is_one_of_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="order: found 'random', expected one of forwards, backwards, snake"):
        HopperTile(rows=64, keys=128, stages=2, box_slots=16, order="random")
