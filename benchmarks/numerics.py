"""What one GPU's arithmetic really does, beside what the error bound assumes of it.

    python benchmarks/numerics.py [--json FILE] [--quick] [--device cuda]

Tensor-core sums are measured with crafted vectors (in the spirit of Fasi, Higham, Mikaitis and Pranesh, PeerJ CS
2021, and of arXiv 2512.07004): one large addend beside many that each lie just under a bit of it, both signs.
exp2, exp, tanh and log are swept over every float32 there is, against float64. Exit code 1 if a section failed or
a measured error exceeds the assumed one. `--quick` looks at one float in 251.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

U = 2.0**-24
CHUNK = 2**24
EXP_ERROR = 2.0**-22  # what the bound assumes of exp
TANH_APPROX = 2.0**-11
TF32 = 2.0**-10
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Row:
    """One measured constant. `measured <= assumed` is what the bound needs; without `assumed` it is information."""

    section: str
    what: str
    measured: float
    assumed: float | None
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.assumed is None or self.measured <= self.assumed


# --- Tensor-core sums -------------------------------------------------------------------------------------------


@triton.jit
def dot_kernel(a, b, c, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """out[p] = c[p] + a[p] @ b[p], each program one tl.dot: a [P, M, K], b [P, K, N], c and out [P, M, N] float32."""
    program = tl.program_id(0)
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    place = program * M * N + rows[:, None] * N + columns[None, :]
    left = tl.load(a + program * M * K + rows[:, None] * K + inner[None, :])
    right = tl.load(b + program * K * N + inner[:, None] * N + columns[None, :])
    tl.store(out + place, tl.dot(left, right, tl.load(c + place), input_precision=PRECISION))


@dataclass(frozen=True)
class Unit:
    """One way to multiply: operand format, tile (64 rows and 4 warps reach wgmma on Hopper), assumed roundoff."""

    name: str
    dtype: torch.dtype
    rows: int
    precision: str
    assumed: float

    @property
    def step(self) -> int:
        """Products that one instruction adds up, or a small multiple of that."""
        return 32 if self.dtype == E4M3 else 16

    def round(self, values: Tensor) -> Tensor:
        """float64 to the operands' format and back; for tf32 cut to its ten fraction bits, so that it is exact."""
        if self.precision == "tf32":
            return (values.float().view(torch.int32) & ~0x1FFF).view(torch.float32).double()
        return values.to(self.dtype).double()

    def dot(self, a: Tensor, b: Tensor, c: Tensor, device: torch.device) -> tuple[Tensor, str]:
        """(c + a @ b as float64 on the host, which instruction did it); float64 [P, M, K], [P, K, N], [P, M, N]."""
        out = torch.empty(c.shape, dtype=torch.float32, device=device)
        left, right = (part.to(self.dtype).contiguous().to(device) for part in (a, b))
        shape = (a.shape[1], b.shape[2], a.shape[2])
        warps = 4 if self.rows >= 64 else 1
        start = c.float().to(device)
        compiled = dot_kernel[(len(a),)](left, right, start, out, *shape, PRECISION=self.precision, num_warps=warps)
        code = compiled.asm["ptx"] if hasattr(compiled, "asm") else ""
        kinds = [kind for kind in ("wgmma.mma_async", "mma.sync", "fma.rn.f32") if kind in code]
        return out.cpu().double(), kinds[0] if kinds else "unknown instruction"


def units() -> Iterator[Unit]:
    for rows, kind in ((16, "mma"), (64, "wgmma")):
        for dtype in (torch.float16, torch.bfloat16):
            yield Unit(f"{_name(dtype)} {kind}", dtype, rows, "ieee", 2.0**-23)
        yield Unit(f"tf32 {kind}", torch.float32, rows, "tf32", 2.0**-23)
        yield Unit(f"e4m3 {kind}", E4M3, rows, "ieee", 2.0**-13)
        yield Unit(f"float32 ieee, {rows} rows", torch.float32, rows, "ieee", 2.0**-24)


def accumulators(device: torch.device, quick: bool) -> Iterator[Row]:
    """The roundoff u that makes |error| <= (1.1 K + 2) * u * (|c| + sum |a_i b_i|) hold, and what lies behind it."""
    for unit in units():
        try:
            yield from _measure_unit(unit, device, quick)
        except Exception as error:  # one format that a machine lacks must not hide the others
            words = f"{type(error).__name__}: {str(error)[:200]!r}"
            yield Row("sums", f"{unit.name}: effective unit roundoff", math.inf, unit.assumed, words)


def _measure_unit(unit: Unit, device: torch.device, quick: bool) -> Iterator[Row]:
    worst, place, instruction = 0.0, "", ""
    for inner in (unit.step, 128) if quick else (unit.step, 128, 256):
        a, b, c = _vectors(unit, inner)
        got, instruction = unit.dot(a, b, c, device)
        error = (got - (c + a @ b)).abs() / (c.abs() + a.abs() @ b.abs())
        if float(error.max()) / (1.1 * inner + 2) > worst:
            worst = float(error.max()) / (1.1 * inner + 2)
            place = f", at K = {inner}"
    yield Row("sums", f"{unit.name}: effective unit roundoff", worst, unit.assumed, instruction + place)
    bits, rounded = _kept_bits(unit, device), _rounding(unit, device)
    yield Row("sums", f"{unit.name}: smallest addends 2^-e not lost beside 1: e", bits, None, instruction)
    note = "0 truncates, 1 rounds"
    unit_of = 13 if unit.dtype == E4M3 else 23
    yield Row("sums", f"{unit.name}: 1 + 0.75 * 2^-{unit_of} gives 1 + this * 2^-{unit_of}", rounded, None, note)


def _vectors(unit: Unit, inner: int) -> tuple[Tensor, Tensor, Tensor]:
    """a [P, M, K], b [P, K, 16], c [P, M, 16] float64, exact in the unit's formats.

    One large addend (c, or the first product) beside small ones of 0.25 .. 1.75 times a power of two, same and
    opposite signs; then random ones of more and more different sizes.
    """
    generator = torch.Generator().manual_seed(inner)
    lowest = 18 if unit.dtype == E4M3 else 27
    left, right, start = [], [], []
    for exponent in range(4, lowest):
        root = 2.0 ** -(exponent // 2)
        for fraction in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
            for sign in (1.0, -1.0):
                a = torch.full((inner,), root, dtype=torch.float64)
                b = torch.full((inner,), sign * fraction * 2.0**-exponent / root, dtype=torch.float64)
                left.append(a), right.append(b), start.append(1.0)
                a, b = a.clone(), b.clone()
                a[0], b[0] = 1.0, 1.0
                left.append(a), right.append(b), start.append(0.0)
    for spread in (0, 2, 4, 8):
        for _ in range(16):
            a, b = (torch.randn(inner, dtype=torch.float64, generator=generator) for _ in range(2))
            sizes = 2.0 ** torch.randint(-spread, spread + 1, (inner,), generator=generator).double()
            left.append(a * sizes), right.append(b), start.append(float(torch.randn((), generator=generator)))
    rows = 2.0 ** -(torch.arange(unit.rows) % 2).double()
    columns = 1.0 - 2.0 * (torch.arange(16) % 2).double()
    a = unit.round(torch.stack(left)[:, None, :] * rows[:, None])
    b = unit.round(torch.stack(right)[:, :, None] * columns)
    c = torch.tensor(start, dtype=torch.float64).float().double()[:, None, None].expand(-1, unit.rows, 16)
    return a, b, c


def _kept_bits(unit: Unit, device: torch.device) -> float:
    """The largest e for which many addends of 2**-e beside an addend of 1, all in one step, are not lost."""
    exponents = torch.arange(4, 19 if unit.dtype == E4M3 else 28)
    roots = 2.0 ** -(exponents // 2).double()
    a = roots[:, None].expand(-1, unit.step).clone()
    b = (2.0 ** -exponents.double() / roots)[:, None].expand(-1, unit.step).clone()
    a[:, 0], b[:, 0] = 1.0, 1.0
    got = _sums(unit, a, b, 0.0, device)
    return float(exponents[got > 1.0].max())


def _rounding(unit: Unit, device: torch.device) -> float:
    """(result - 1) in units of 2**-23 for c = 1 and one product of 0.75 * 2**-23; for e4m3 2**-13."""
    exponent = 13 if unit.dtype == E4M3 else 23
    a, b = torch.zeros(1, unit.step, dtype=torch.float64), torch.zeros(1, unit.step, dtype=torch.float64)
    a[0, 0] = 0.75 * 2.0 ** -(exponent // 2 - 1)
    b[0, 0] = 2.0 ** -(exponent - exponent // 2 + 1)
    return float((_sums(unit, a, b, 1.0, device)[0] - 1.0) * 2.0**exponent)


def _sums(unit: Unit, a: Tensor, b: Tensor, c: float, device: torch.device) -> Tensor:
    """c + <a[p], b[p]> for each p, [P] float64."""
    left = a[:, None, :].expand(-1, unit.rows, -1)
    right = b[:, :, None].expand(-1, -1, 16)
    got, _ = unit.dot(left, right, torch.full((len(a), unit.rows, 16), c, dtype=torch.float64), device)
    return got[:, 0, 0]


def tf32_operands(device: torch.device, quick: bool) -> Iterator[Row]:
    """How far tf32 moves an operand: 2**-11 if it rounds, 2**-10 if it drops the low bits."""
    for rows, kind in ((16, "mma"), (64, "wgmma")):
        unit = Unit(f"tf32 {kind}", torch.float32, rows, "tf32", 2.0**-23)
        count = 64
        eye = torch.eye(16, dtype=torch.float64)
        grid = 1.0 + torch.arange(count * rows * 16, dtype=torch.float64).view(count, rows, 16) * 2.0**-23
        for side, places in (("left", rows), ("right", 16)):
            values = (grid[:, :places] * 1.25).float().double()
            wide = eye.repeat(rows // 16, 1).expand(count, -1, -1)
            operands = (values, eye.expand(count, -1, -1)) if side == "left" else (wide, values)
            got, instruction = unit.dot(*operands, torch.zeros(count, rows, 16, dtype=torch.float64), device)
            worst = float((got[:, :places] / values - 1).abs().max())
            yield Row("sums", f"{unit.name}: roundoff of the {side} operand", worst, TF32, instruction)


# --- Functions, over every float32 ------------------------------------------------------------------------------


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
        asked = (x >= low) & (x <= high) & (want.abs() >= 2.0**-126) & want.isfinite()
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
    yield Row("exp", "tl.exp2, absolute, x < -126", worst, 2.0**-126, f"at x = {x!r}")


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
    for dtype, largest in ((torch.bfloat16, 3e38), (torch.float16, 65504.0), (E4M3, 448.0)):
        out = torch.empty(CHUNK, dtype=dtype, device=device)
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        for first in range(-(2**31), 2**31, CHUNK * step):
            cast_kernel[(CHUNK // 1024,)](out, first, step, LARGEST=largest, BLOCK=1024)
            x = (first + offsets).to(torch.int32).view(torch.float32)
            want = x.clamp(-largest, largest).to(dtype)
            wrong += ((out.float() != want.float()) & ~x.isnan()).sum()
        yield Row("casts", f"float32 to {_name(dtype)}, not the nearest even", float(wrong), 0.0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


SECTIONS = (accumulators, tf32_operands, exponentials, tanhs, logarithms, divisions, casts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the table to this file")
    parser.add_argument("--quick", action="store_true", help="one float32 in 251")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows: list[Row] = []
    failed = []
    for section in SECTIONS:
        try:
            for row in section(device, options.quick):
                rows.append(row)
                print(_line(row), flush=True)
        except Exception:
            failed.append(section.__name__)
            print(f"{section.__name__} FAILED", flush=True)
            traceback.print_exc(file=sys.stdout)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    if options.json:
        body = {"machine": machine, "torch": torch.__version__, "triton": triton.__version__, "failed": failed}
        body["rows"] = [asdict(row) | {"holds": row.holds} for row in rows]
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(body, file, indent=1)
    exceeded = [row.what for row in rows if not row.holds]
    print(f"{machine}, torch {torch.__version__}, triton {triton.__version__}: {len(rows)} constants", end="")
    print(f", exceeded: {exceeded or 'none'}, failed sections: {failed or 'none'}")
    return 1 if failed or exceeded else 0


def _line(row: Row) -> str:
    power = f"2^{math.log2(row.measured):.2f}" if 0 < row.measured < math.inf and row.assumed not in (None, 1.0) else ""
    assumed = "" if row.assumed is None else f"{row.assumed:.4g}"
    verdict = "ok" if row.holds else "EXCEEDS"
    return f"{row.section:9}{row.what:78}{row.measured:<12.5g}{power:10}{assumed:12}{verdict:8}{row.note}"


if __name__ == "__main__":
    sys.exit(main())
