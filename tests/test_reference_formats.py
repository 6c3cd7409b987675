"""Every output format is the float64 answer rounded once; float8 inputs mean their value times their scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pageproof.reference import Scales, attention
from pageproof.reference.casting import narrow

from .reference_cases import close, draw

FLOAT8 = torch.float8_e4m3fn
NARROW = [torch.float16, torch.bfloat16, FLOAT8]


def all_positive(dtype: torch.dtype) -> Tensor:
    """Every value of the format from 0 to its largest, in order, as float64: the bit patterns themselves."""
    patterns = torch.arange(2 ** (8 * dtype.itemsize - 1))
    integers = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    values = patterns.to(integers).view(dtype).double()
    return values[values.isfinite()]


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round positive float64 to nearest, ties to the even pattern, by search; the largest value where beyond it."""
    grid = all_positive(dtype)
    above = torch.searchsorted(grid, values).clamp(1, len(grid) - 1)
    below = above - 1
    middle = (grid[below] + grid[above]) / 2  # exact: at most one bit more than the format has
    up = (values > middle) | ((values == middle) & (above % 2 == 0))
    return grid[torch.where(up, above, below)]


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_rounds_once_to_nearest_even(dtype: torch.dtype) -> None:
    grid = all_positive(dtype)
    middles = (grid[1:] + grid[:-1]) / 2
    nudge = 1 + 2.0**-45  # invisible in float32, so a cast by way of float32 sees a tie
    generator = torch.Generator().manual_seed(0)
    scattered = grid[1:] * (1 + torch.rand(len(grid) - 1, generator=generator, dtype=torch.float64) * 2.0**-7)
    values = torch.cat((grid, middles, middles * nudge, middles / nudge, scattered.clamp(max=float(grid[-1]))))
    expected = nearest(values, dtype)
    assert torch.equal(narrow(values, dtype).double(), expected)
    assert torch.equal(narrow(-values, dtype).double(), -expected)
    assert int((values.to(dtype).double() != expected).sum()) > 0, "torch's own cast would do"


def test_float8_saturates_and_keeps_nan() -> None:
    values = torch.tensor([448.0, 464.0, 465.0, 1e300, torch.inf, -torch.inf, -500.0], dtype=torch.float64)
    assert narrow(values, FLOAT8).double().tolist() == [448.0] * 5 + [-448.0] * 2
    assert bool(narrow(torch.tensor([torch.nan], dtype=torch.float64), FLOAT8).isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wider_formats_overflow_to_infinity(dtype: torch.dtype) -> None:
    limit = float(all_positive(dtype)[-1])
    values = torch.tensor([limit, limit * (1 + 2.0**-20), limit * 1.01, 1e300], dtype=torch.float64)
    assert narrow(values, dtype).double().tolist() == [limit, limit, torch.inf, torch.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(700, 706))
def test_plain_formats_are_the_float64_answer_cast_once(seed: int, dtype: torch.dtype) -> None:
    problem = draw(seed, dtype)
    out, lse = attention(*problem.arguments)
    wide = replace(problem, q=problem.q.double(), k_cache=problem.k_cache.double(), v_cache=problem.v_cache.double())
    wide_out, wide_lse = attention(*wide.arguments)
    assert (out.dtype, lse.dtype, wide_lse.dtype) == (dtype, torch.float32, torch.float64)
    assert torch.equal(out, narrow(wide_out, dtype))
    assert torch.equal(lse, wide_lse.float())


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("seed", range(710, 716))
def test_float8_inputs_and_output_with_scales(seed: int, per_head: bool) -> None:
    problem = draw(seed)
    num_kv_heads, heads = problem.k_cache.shape[2], problem.q.shape[1]
    generator = torch.Generator().manual_seed(seed)
    scales = Scales(*(torch.rand(num_kv_heads if per_head else 1, generator=generator) + 0.1 for _ in range(4)))
    eight = replace(
        problem,
        q=problem.q.to(FLOAT8),
        k_cache=problem.k_cache.to(FLOAT8),
        v_cache=problem.v_cache.to(FLOAT8),
    )
    out = torch.empty(*problem.q.shape[:2], problem.v_cache.shape[3], dtype=FLOAT8)
    lse = torch.empty(problem.q.shape[:2], dtype=torch.float64)
    returned = attention(*eight.arguments, scales=scales, out=out, lse=lse)
    assert returned[0] is out
    assert returned[1] is lse
    q_scale, k_scale, v_scale, out_scale = (
        scale.double().expand(num_kv_heads) for scale in (scales.q, scales.k, scales.v, scales.out)
    )
    head_of = [head // (heads // num_kv_heads) for head in range(heads)]
    wide = replace(
        problem,
        q=eight.q.double() * q_scale[head_of, None],
        k_cache=eight.k_cache.double() * k_scale[:, None],
        v_cache=eight.v_cache.double() * v_scale[:, None],
    )
    wide_out, wide_lse = attention(*wide.arguments)
    assert torch.equal(out.double(), narrow(wide_out / out_scale[head_of, None], FLOAT8).double())
    close(lse, wide_lse, 1e-14)


def test_default_formats() -> None:
    problem = draw(717)
    eight = replace(
        problem, q=problem.q.to(FLOAT8), k_cache=problem.k_cache.to(FLOAT8), v_cache=problem.v_cache.to(FLOAT8)
    )
    out, lse = attention(*eight.arguments)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    out, lse = attention(*replace(eight, q=problem.q.half()).arguments)
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)


def test_out_and_lse_may_be_views_with_gaps() -> None:
    problem = draw(718)
    expected_out, expected_lse = attention(*problem.arguments)
    tokens, heads, size = expected_out.shape
    buffer = torch.full((tokens, heads + 2, size + 3), 7.0, dtype=torch.float64)
    lse_buffer = torch.full((tokens, heads + 2), 7.0, dtype=torch.float64)
    attention(*problem.arguments, out=buffer[:, 1 : heads + 1, 1 : size + 1], lse=lse_buffer[:, 1 : heads + 1])
    assert torch.equal(buffer[:, 1 : heads + 1, 1 : size + 1], expected_out)
    assert torch.equal(lse_buffer[:, 1 : heads + 1], expected_lse)
    assert float(buffer.sum() - expected_out.sum()) == pytest.approx(7.0 * (buffer.numel() - expected_out.numel()))
    assert bool((lse_buffer[:, [0, -1]] == 7.0).all())
