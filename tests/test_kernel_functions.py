"""Device functions on their own, against float64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pageproof.optimized.kernels.tiles import tanh

BLOCK = 1024


@triton.jit
def apply_tanh(source, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, tanh(tl.load(source + place)))


def test_tanh_is_accurate_for_small_and_large_arguments(pageproof_device: torch.device) -> None:
    """The relative error that the contract of our kernels declares: 16u and three errors of exp2, of 4u each."""
    positive = torch.cat([torch.logspace(-30, 2, 6 * BLOCK), torch.linspace(0.2, 0.3, 2 * BLOCK)])
    source = torch.cat([positive, -positive]).to(pageproof_device)
    out = torch.empty_like(source)
    apply_tanh[(source.numel() // BLOCK,)](source, out, BLOCK=BLOCK)
    wanted = torch.tanh(source.double())
    assert float(((out.double() - wanted) / wanted).abs().max()) <= 28 * 2.0**-24


def test_tanh_knows_its_limits(pageproof_device: torch.device) -> None:
    inf = float("inf")
    source = torch.tensor([inf, -inf, 0.0, float("nan")] * (BLOCK // 4), device=pageproof_device)
    out = torch.empty_like(source)
    apply_tanh[(1,)](source, out, BLOCK=BLOCK)
    assert out[:3].tolist() == [1.0, -1.0, 0.0]
    assert bool(out[3].isnan())
