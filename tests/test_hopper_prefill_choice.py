"""Which prefills take the kernel for Hopper: a function of formats, sizes and strides alone, and its tiles fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof.optimized.hopper_prefill import tile_of, why_portable
from pageproof.optimized.kernels.arguments import Step, paged_kv
from pageproof.optimized.kernels.hopper.sizes import PrefillTile
from pageproof.optimized.shapes import Shape, padded, tiles
from pageproof.optimized.tile_table import ARCHITECTURES, Operands
from pageproof.oracle import BatchShape, Case, Spec
from pageproof.oracle.building.tensors import build
from pageproof.oracle.case import CACHE_LAYOUTS

from .hopper_steps import BLOCK_SIZE, BLOCKS, bfloat16, step

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


def why(shape: Shape = SHAPE, k: Tensor | None = None, v: Tensor | None = None) -> str | None:
    packed = bfloat16(BLOCKS, BLOCK_SIZE, 2, 128)
    return why_portable(shape, of_caches(packed if k is None else k, packed if v is None else v))


def of_caches(k: Tensor, v: Tensor) -> Step:
    return step(bfloat16(2, 8, k.shape[3]), cache=paged_kv(k, v))


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
        ({"head_size": 100}, "queries of 100 columns, no multiple of 16 bytes"),
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
    ("cache", "words"),
    [
        (bfloat16(BLOCKS, BLOCK_SIZE, 2, 136)[..., 4:132], "does not begin on 16 bytes"),
        (bfloat16(0, BLOCK_SIZE, 2, 128), "is empty"),
        (bfloat16(BLOCKS, BLOCK_SIZE, 128, 2).transpose(2, 3), "not contiguous"),
        (bfloat16(BLOCKS, BLOCK_SIZE, 2, 130)[..., :128], "strides (4160, 260, 130, 1)"),
        (bfloat16(1, BLOCK_SIZE, 2, 128).expand(BLOCKS, -1, -1, -1), "strides (0, 256, 128, 1)"),
    ],
    ids=["off 16 bytes", "no pages", "columns apart", "rows off 16 bytes", "one page as several"],
)
def test_caches_that_cannot_be_copied_in_boxes(cache: Tensor, words: str) -> None:
    for name in ("k", "v"):
        found = why(**{name: cache})
        assert found is not None
        assert found.startswith(f"{name}_cache")
        assert words in found


def test_pages_too_far_apart_to_be_copied() -> None:
    """As a cache's strides say; there is no such memory."""
    cache = paged_kv(bfloat16(BLOCKS, BLOCK_SIZE, 2, 128), bfloat16(BLOCKS, BLOCK_SIZE, 2, 128))
    far = cache._replace(k=cache.k._replace(stride_block=2**39))
    assert "strides" in (why_portable(SHAPE, step(bfloat16(2, 8, 128), cache=far)) or "")


def test_a_query_bias_is_not_taken() -> None:
    biased = of_caches(bfloat16(BLOCKS, BLOCK_SIZE, 2, 128), bfloat16(BLOCKS, BLOCK_SIZE, 2, 128))
    biased = biased._replace(rules=biased.rules._replace(query_bias=torch.zeros(2, 4)))
    assert "query bias" in (why_portable(SHAPE, biased) or "")


def test_a_negative_softmax_scale_is_not_taken() -> None:
    plain = of_caches(bfloat16(BLOCKS, BLOCK_SIZE, 2, 128), bfloat16(BLOCKS, BLOCK_SIZE, 2, 128))
    for scale in (0.1, 0.0, -0.0):
        assert why_portable(SHAPE, plain._replace(rules=plain.rules._replace(softmax_scale=scale))) is None
    negative = plain._replace(rules=plain.rules._replace(softmax_scale=-0.1))
    assert "negative softmax scale" in (why_portable(SHAPE, negative) or "")


@pytest.mark.parametrize(
    ("q", "words"),
    [
        (bfloat16(2, 8, 136)[..., 4:132], "do not begin on 16 bytes"),
        (bfloat16(2, 8, 130)[..., :128], "strides (1040, 130)"),
        (bfloat16(2, 8 * 128 + 4)[:, : 8 * 128].view(2, 8, 128), "strides (1028, 128)"),
    ],
    ids=["off 16 bytes", "heads off 16 bytes", "tokens off 16 bytes"],
)
def test_queries_that_cannot_be_copied_16_bytes_at_a_time(q: Tensor, words: str) -> None:
    cache = paged_kv(bfloat16(BLOCKS, BLOCK_SIZE, 2, 128), bfloat16(BLOCKS, BLOCK_SIZE, 2, 128))
    assert words in (why_portable(SHAPE, step(q, cache=cache)) or "")


def test_queries_too_far_apart_to_be_counted_in_32_bits() -> None:
    """As strides say; there is no such memory."""
    plain = of_caches(bfloat16(BLOCKS, BLOCK_SIZE, 2, 128), bfloat16(BLOCKS, BLOCK_SIZE, 2, 128))
    for stride, is_taken in ((2**24 - 8, True), (2**24, False)):
        found = why_portable(SHAPE, plain._replace(queries=plain.queries._replace(stride_token=stride)))
        assert is_taken is (found is None)
        assert is_taken or "beyond 32 bits" in (found or "")


def test_queries_of_a_fused_projection_are_taken() -> None:
    """Whose strides are multiples of 16 bytes, but of no more."""
    cache = paged_kv(bfloat16(BLOCKS, BLOCK_SIZE, 2, 128), bfloat16(BLOCKS, BLOCK_SIZE, 2, 128))
    assert why_portable(SHAPE, step(bfloat16(2, 8 * 136 + 8)[:, 8:].view(2, 8, 136)[..., :128], cache=cache)) is None


TAKEN = {"NHD", "HND", "interleaved", "head_major", "sliced", "slot_major"}


@pytest.mark.parametrize("odd_strides", [False, True])
@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_the_layouts_that_cases_have(layout: str, odd_strides: bool) -> None:
    """Odd strides of values are no multiples of 16 bytes, but for those that share the padded rows of keys."""
    spec = Spec(head_size=128, head_size_v=128, cache_layout=layout, odd_strides=odd_strides)
    arguments = build(Case(spec=spec, batch=BatchShape(query_lens=(40,), seq_lens=(70,))), "cpu").arguments
    found = why(k=arguments["k_cache"], v=arguments["v_cache"])
    assert (found is None) is (layout == "interleaved" if odd_strides else layout in TAKEN)


def test_what_no_stride_means_does_not_matter() -> None:
    packed = bfloat16(1, 16, 1, 128)
    odd = packed.as_strided(packed.shape, (1_000_003, 128, 1_000_003, 1))
    assert why(k=odd, v=odd) is None


@pytest.mark.parametrize("sizes", [(48, 64), (64, 64), (128, 128), (96, 256), (192, 128), (256, 256)], ids=str)
def test_tiles_fit_and_keep_to_the_declared_arithmetic(sizes: tuple[int, int]) -> None:
    shape = replace(SHAPE, head_size=sizes[0], head_size_v=sizes[1])
    tile, (keys, columns) = tile_of(shape), map(padded, sizes)
    shared = 2 * (2 * tile.rows * keys + tile.stages * tile.keys * (keys + columns)) + 1024
    assert shared <= ARCHITECTURES["sm_90"].shared_memory
    # The contract that the adapter declares has the fewest keys of a step that any kernel takes: those of decode.
    assert tile.keys >= tiles(shape, prefill=False).block_n


@pytest.mark.parametrize(
    ("block_size", "slots"), [(8, 8), (16, 16), (24, 8), (48, 16), (128, 128), (256, 128), (544, 32)]
)
def test_a_copy_brings_slots_of_one_page(block_size: int, slots: int) -> None:
    tile = tile_of(replace(SHAPE, block_size=block_size))
    assert tile.box_slots == slots
    assert tile.keys % tile.box_slots == block_size % tile.box_slots == 0


def test_an_order_is_one_of_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="order: found 'random', expected one of forwards, backwards, snake"):
        PrefillTile(rows=64, keys=128, stages=2, box_slots=16, order="random")
