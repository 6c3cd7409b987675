"""merge_states joins disjoint parts; an empty part contributes nothing, an infinite one everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pageproof.reference import merge_states

INF, NAN = float("inf"), float("nan")


def one(out: float, lse: float) -> tuple[Tensor, Tensor]:
    return torch.full((1, 1, 2), out, dtype=torch.float64), torch.full((1, 1), lse, dtype=torch.float64)


@pytest.mark.parametrize(
    ("a", "b", "out", "lse"),
    [
        ((5.0, -INF), (7.0, -INF), 0.0, -INF),
        ((NAN, -INF), (NAN, -INF), 0.0, -INF),
        ((NAN, -INF), (7.0, 2.0), 7.0, 2.0),
        ((INF, -INF), (7.0, -3e38), 7.0, -3e38),
        ((0.0, INF), (7.0, 80.0), 0.0, INF),
        ((0.0, INF), (NAN, -INF), 0.0, INF),
        ((4.0, INF), (7.0, -80.0), 4.0, INF),
        ((1.0, 0.0), (3.0, 0.0), 2.0, 0.6931471805599453),
        ((1.0, 700.0), (3.0, -700.0), 1.0, 700.0),
        ((1.0, 3e38), (3.0, 3e38), 2.0, 3e38),
    ],
)
def test_truth_table(a: tuple[float, float], b: tuple[float, float], out: float, lse: float) -> None:
    for first, second in ((a, b), (b, a)):
        merged, merged_lse = merge_states(*one(*first), *one(*second))
        assert merged.flatten().tolist() == pytest.approx([out, out], rel=1e-15)
        assert float(merged_lse) == pytest.approx(lse, rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_result_is_the_float64_one_cast_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    out_a, out_b = torch.randn(2, 50, 4, 8, generator=generator).to(dtype)
    lse_a, lse_b = torch.randn(2, 50, 4, generator=generator) * 5
    out, lse = merge_states(out_a, lse_a, out_b, lse_b, validate=True)
    weight_a, weight_b = lse_a.double().exp()[..., None], lse_b.double().exp()[..., None]
    expected = (weight_a * out_a.double() + weight_b * out_b.double()) / (weight_a + weight_b)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(lse, torch.log(weight_a + weight_b)[..., 0].float())
    ulp = torch.finfo(dtype).eps * expected.abs().clamp(min=torch.finfo(dtype).tiny)
    assert bool(((out.double() - expected).abs() <= 0.5001 * ulp).all())


def test_no_rows() -> None:
    out, lse = merge_states(torch.zeros(0, 2, 3), torch.zeros(0, 2), torch.zeros(0, 2, 3), torch.zeros(0, 2))
    assert (tuple(out.shape), tuple(lse.shape)) == ((0, 2, 3), (0, 2))
