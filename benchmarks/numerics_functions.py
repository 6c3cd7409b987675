"""exp2, exp, tanh, log, division and casts, over every float32 there is, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from numerics_row import E4M3, Row
from torch import Tensor
from triton.language.extra import libdevice

from pageproof.oracle import NumericContract
from pageproof.oracle.bound.formats import FLUSH, U
from pageproof.oracle.bound.scores import TANH_APPROX
from pageproof.oracle.formats import FLOAT8_LARGEST, name_of

EXP_ERROR = NumericContract().exp_error  # what a kernel declares that says nothing else about itself
CHUNK = 2**24


@triton.jit
def sweep_kernel(out, first, step, FUNCTION: tl.constexpr, PARAMETER: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = f(the float32 whose bits are first + i * step)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (first + index * step).to(tl.int32).to(tl.float32, bitcast=True)
    if FUNCTION == "exp2":
        y = tl.exp2(x)
    elif FUNCTION == "exp":
        y = tl.exp(x)
    elif FUNCTION == "log":
        y = tl.log(x)
    elif FUNCTION == "softcap":
        grown = tl.exp2(x * (2.0 / PARAMETER) * 1.4426950408889634)
        y = PARAMETER * (1.0 - 2.0 / (grown + 1.0))
    elif FUNCTION == "tanh":
        y = libdevice.tanh(x)
    else:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(out + index, y)


Judge = Callable[[Tensor, Tensor], Tensor]  # (x float64, y float64) -> error, NaN where not asked


def sweep(
    function: str, judge: Judge, device: torch.device, quick: bool, parameter: float = 1.0
) -> tuple[float, float]:
    """(largest error, the x where it is) over all finite float32, or every 251st."""
    step = 251 if quick else 1
    count = CHUNK
    out = torch.empty(count, dtype=torch.float32, device=device)
    offsets = torch.arange(count, dtype=torch.int64, device=device) * step
    worst, place = 0.0, math.nan
    largest = []
    for first in range(-(2**31), 2**31, count * step):
        sweep_kernel[(count // 1024,)](out, first, step, FUNCTION=function, PARAMETER=parameter, BLOCK=1024)
        bits = (first + offsets).to(torch.int32)  # wraps past the end: those floats are seen twice
        x = bits.view(torch.float32).double()
        error = judge(x, out.double()).nan_to_num(nan=-1.0, posinf=math.inf)
        value, index = error.max(dim=0)
        largest.append(torch.stack((value, x[index])))
    for value, x_at in torch.stack(largest).tolist():
        if value > worst:
            worst, place = value, x_at
    return worst, place


def relative_to(exact: Callable[[Tensor], Tensor], low: float, high: float, slope: float = 0.0) -> Judge:
    """Relative error for x in [low, high], less slope * |x|; results that are subnormal are left to `flushed`."""

    def judge(x: Tensor, y: Tensor) -> Tensor:
        want = exact(x)
        error = (y - want).abs() / want.abs() - slope * x.abs()
        asked = (x >= low) & (x <= high) & (want.abs() >= FLUSH) & want.isfinite()
        return torch.where(asked, error, math.nan)

    return judge


def exponentials(device: torch.device, quick: bool) -> Iterator[Row]:
    worst, x = sweep("exp2", relative_to(torch.exp2, -126.0, 127.99), device, quick)
    yield Row("exp", "tl.exp2, relative, x in [-126, 128)", worst, EXP_ERROR, f"at x = {x!r}")
    worst, x = sweep("exp2", relative_to(torch.exp2, -126.0, 0.0), device, quick)
    yield Row("exp", "tl.exp2, relative, x in [-126, 0]", worst, EXP_ERROR, f"at x = {x!r}")
    worst, x = sweep("exp", relative_to(torch.exp, -87.0, 88.0), device, quick)
    yield Row("exp", "tl.exp, relative, x in [-87, 88]", worst, None, f"at x = {x!r}")
    worst, x = sweep("exp", relative_to(torch.exp, -87.0, 0.0, 2 * U), device, quick)
    yield Row("exp", "tl.exp, relative less 2 u |x|, x in [-87, 0]", worst, EXP_ERROR, f"at x = {x!r}")

    def flushed(x: Tensor, y: Tensor) -> Tensor:
        want = torch.exp2(x)
        return torch.where(x < -126.0, (y - want).abs(), math.nan)

    worst, x = sweep("exp2", flushed, device, quick)
    yield Row("exp", "tl.exp2, absolute, x < -126", worst, FLUSH, f"at x = {x!r}")


def tanhs(device: torch.device, quick: bool) -> Iterator[Row]:
    for cap in (50.0, 30.0, 0.1):

        def judge(x: Tensor, y: Tensor, cap: float = cap) -> Tensor:
            want = cap * torch.tanh(x / cap)
            slope = torch.cosh(x.abs().clamp(max=300 * cap) / cap) ** -2
            allowed = 2 * U * x.abs() * slope + cap * (4 * U + 1.5 * EXP_ERROR) + 4 * U * want.abs()
            allowed = allowed + 4 * U * x.abs().clamp(max=40 * cap) * slope
            return torch.where(x.isfinite(), (y - want).abs() / allowed, math.nan)

        worst, x = sweep("softcap", judge, device, quick, cap)
        what = f"c * (1 - 2 / (exp2(x * 2/c * log2 e) + 1)), c = {cap}: error / allowed"
        yield Row("tanh", what, worst, 1.0, f"at x = {x!r}")
    worst, x = sweep("tanh", relative_to(torch.tanh, -math.inf, math.inf), device, quick)
    yield Row("tanh", "libdevice tanh, relative", worst, 4 * U, f"at x = {x!r}")
    worst, x = sweep("approx", relative_to(torch.tanh, -math.inf, math.inf), device, quick)
    yield Row("tanh", "tanh.approx.f32, relative", worst, TANH_APPROX, f"at x = {x!r}")


def logarithms(device: torch.device, quick: bool) -> Iterator[Row]:
    def judge(x: Tensor, y: Tensor) -> Tensor:
        want = torch.log(x)
        return torch.where((x >= 1.0) & x.isfinite(), (y - want).abs() / (4 * U * want.abs() + 4 * U), math.nan)

    worst, x = sweep("log", judge, device, quick)
    yield Row("log", "tl.log, x >= 1: error / (4u |log x| + 4u)", worst, 1.0, f"at x = {x!r}")


@triton.jit
def divide_kernel(a, b, quotient, exact_quotient, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + index), tl.load(b + index)
    tl.store(quotient + index, x / y)
    tl.store(exact_quotient + index, tl.div_rn(x, y))


def divisions(device: torch.device, quick: bool) -> Iterator[Row]:
    """Random significands; exponents in +-30, so that no quotient leaves the normal range."""
    generator = torch.Generator(device=device).manual_seed(1)
    count = CHUNK // 16 if quick else CHUNK
    worst, wrong = 0.0, 0
    for _ in range(1 if quick else 8):
        a, b = (_random_floats(count, generator, device) for _ in range(2))
        fast, exact = torch.empty_like(a), torch.empty_like(a)
        divide_kernel[(count // 1024,)](a, b, fast, exact, BLOCK=1024)
        want = a.double() / b.double()
        worst = max(worst, float(((fast.double() - want) / want).abs().max()))
        wrong += int((exact != want.float()).sum())
    yield Row("division", "a / b, relative", worst, 4 * U, "div.full.f32: 2 units in the last place")
    yield Row("division", "tl.div_rn, quotients that are not the nearest float32", float(wrong), 0.0)


def _random_floats(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    significand = torch.randint(0, 2**23, (count,), generator=generator, device=device, dtype=torch.int32)
    exponent = torch.randint(97, 158, (count,), generator=generator, device=device, dtype=torch.int32)
    return (exponent << 23 | significand).view(torch.float32)


@triton.jit
def cast_kernel(out, first, step, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (first + index * step).to(tl.int32).to(tl.float32, bitcast=True)
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    tl.store(out + index, x.to(out.dtype.element_ty))


def casts(device: torch.device, quick: bool) -> Iterator[Row]:
    """float32 to the narrow formats against torch's cast, clamped first; NaN is not asked for."""
    step = 251 if quick else 1
    offsets = torch.arange(CHUNK, dtype=torch.int64, device=device) * step
    for dtype, largest in ((torch.bfloat16, 3e38), (torch.float16, 65504.0), (E4M3, FLOAT8_LARGEST)):
        out = torch.empty(CHUNK, dtype=dtype, device=device)
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        for first in range(-(2**31), 2**31, CHUNK * step):
            cast_kernel[(CHUNK // 1024,)](out, first, step, LARGEST=largest, BLOCK=1024)
            x = (first + offsets).to(torch.int32).view(torch.float32)
            want = x.clamp(-largest, largest).to(dtype)
            wrong += ((out.float() != want.float()) & ~x.isnan()).sum()
        yield Row("casts", f"float32 to {name_of(dtype)}, not the nearest even", float(wrong), 0.0)
