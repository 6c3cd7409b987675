"""Which steps of absorbed MLA the Hopper kernel takes: by sizes, formats, strides and rules, on any machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof.optimized.hopper import box_slots
from pageproof.optimized.hopper_mla import why_portable
from pageproof.optimized.kernels.arguments import DeviceScales, Scale, ScoreRules, Step, latent_kv, outputs
from pageproof.optimized.kernels.hopper.sizes import MLA_KEYS
from pageproof.optimized.shapes import Shape, tiles
from pageproof.optimized.tile_table import Operands

from . import hopper_steps
from .hopper_steps import BLOCK_SIZE, BLOCKS, RULES, bfloat16

TOKENS, HEADS = 2, 128
SHAPE = Shape(
    num_kv_heads=1,
    group=HEADS,
    head_size=512,
    head_size_v=512,
    block_size=BLOCK_SIZE,
    arithmetic=torch.bfloat16,
    architecture="sm_90",
    operands=Operands.LATENT,
    rope_size=64,
)


def step(q: Tensor | None = None, cache: Tensor | None = None, **changes: Any) -> Step:
    q = bfloat16(TOKENS, HEADS, 512) if q is None else q
    cache = bfloat16(BLOCKS, BLOCK_SIZE, 576) if cache is None else cache
    return hopper_steps.step(q, rope=bfloat16(*q.shape[:2], 64), cache=latent_kv(cache, 512), **changes)


def test_the_step_of_a_deepseek_layer_is_taken() -> None:
    assert why_portable(SHAPE, step()) is None


@pytest.mark.parametrize("heads", [1, 5, 16, 64, 71, 128, 200])
def test_any_number_of_heads_is_taken(heads: int) -> None:
    q = torch.empty(TOKENS, heads, 512, dtype=torch.bfloat16)
    assert why_portable(replace(SHAPE, group=heads), step(q)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "sm_100"},
        {"operands": Operands.CAST_LATENT},
        {"operands": Operands.COMPUTED},
        {"arithmetic": torch.float32},
        {"head_size": 256},
        {"rope_size": 32},
        {"block_size": 1},
        {"block_size": 4},
        {"block_size": 20},
    ],
    ids=str,
)
def test_other_shapes_are_the_portable_kernels(changes: dict[str, Any]) -> None:
    assert why_portable(replace(SHAPE, **changes), step()) is not None


@pytest.mark.parametrize(
    "rules",
    [
        RULES._replace(softcap=30.0, one_over_softcap=1 / 30.0),
        RULES._replace(sinks=torch.zeros(HEADS)),
        RULES._replace(alibi_slopes=torch.zeros(HEADS)),
    ],
    ids=["softcap", "sinks", "alibi"],
)
def test_rules_that_add_to_a_logit_or_to_the_sum_are_taken(rules: ScoreRules) -> None:
    assert why_portable(SHAPE, step(rules=rules)) is None


def test_a_query_bias_and_float8_are_not() -> None:
    assert why_portable(SHAPE, step(rules=RULES._replace(query_bias=torch.zeros(TOKENS, 4)))) is not None
    assert why_portable(SHAPE, step(scales=DeviceScales(k=Scale(torch.ones(1), 0)))) is not None
    out = torch.empty(TOKENS, HEADS, 512, dtype=torch.float8_e4m3fn)
    assert why_portable(SHAPE, step(outputs=outputs(out, torch.empty(TOKENS, HEADS)))) is not None


@pytest.mark.parametrize(
    "cache",
    [
        bfloat16(BLOCKS, BLOCK_SIZE, 656)[:, :, :576],
        bfloat16(BLOCKS, 2, BLOCK_SIZE, 576)[:, 0],
        bfloat16(BLOCK_SIZE, BLOCKS, 576).transpose(0, 1),
    ],
    ids=["wider rows", "pages of several layers", "slots outermost"],
)
def test_caches_with_whole_rows_are_taken(cache: Tensor) -> None:
    assert why_portable(SHAPE, step(cache=cache)) is None


@pytest.mark.parametrize(
    "cache",
    [
        bfloat16(BLOCKS, BLOCK_SIZE, 580)[:, :, :576],
        bfloat16(BLOCKS, 576, BLOCK_SIZE).transpose(1, 2),
        bfloat16(BLOCKS, BLOCK_SIZE, 584)[:, :, 1:577],
        bfloat16(1, BLOCK_SIZE, 576).expand(BLOCKS, -1, -1),
        bfloat16(0, BLOCK_SIZE, 576),
    ],
    ids=["rows off 16 bytes", "columns apart", "a first row off 16 bytes", "one page as several", "no pages"],
)
def test_caches_that_the_copy_engine_cannot_address_are_not(cache: Tensor) -> None:
    assert why_portable(SHAPE, step(cache=cache)) is not None


def test_heads_outermost_are_taken_where_no_tile_has_a_part_of_a_token() -> None:
    """As a batched product with W_UK leaves them."""
    for heads in (HEADS, 64, 16, 8):
        assert why_portable(replace(SHAPE, group=heads), step(bfloat16(heads, TOKENS, 512).transpose(0, 1))) is None
    assert why_portable(replace(SHAPE, group=72), step(bfloat16(72, TOKENS, 512).transpose(0, 1))) is not None


def test_queries_off_16_bytes_are_not_taken() -> None:
    assert why_portable(SHAPE, step(bfloat16(TOKENS, HEADS, 516)[:, :, :512])) is not None


@pytest.mark.parametrize(
    ("block_size", "rows"), [(8, 8), (16, 16), (24, 8), (48, 16), (64, 64), (96, 32), (128, 64), (544, 32)]
)
def test_a_copy_lies_in_one_block(block_size: int, rows: int) -> None:
    assert box_slots(block_size, MLA_KEYS) == rows


@pytest.mark.parametrize("group", [64, 128])
def test_its_tiles_keep_to_the_declared_arithmetic(group: int) -> None:
    """The contract that the adapter declares has the fewest keys of a step that any kernel takes."""
    shape = replace(SHAPE, group=group)
    assert min(tiles(shape, prefill=prefill).block_n for prefill in (True, False)) <= MLA_KEYS
