"""Sums of products as tl.dot makes them: how far off, how many bits are kept, rounded or cut off.

Crafted vectors in the spirit of Fasi, Higham, Mikaitis and Pranesh (PeerJ CS 2021) and of arXiv 2512.07004: one
large addend beside many that each lie just under a bit of it, both signs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from numerics_row import E4M3, Row
from torch import Tensor

from pageproof.oracle import NumericContract
from pageproof.oracle.bound.formats import TF32, U
from pageproof.oracle.formats import name_of

U_TENSOR_CORE = NumericContract().u_score  # what a kernel declares that says nothing else about itself
U_E4M3 = 2.0**-13  # what a kernel that multiplies float8 directly has to declare as u_score and u_value


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
            yield Unit(f"{name_of(dtype)} {kind}", dtype, rows, "ieee", U_TENSOR_CORE)
        yield Unit(f"tf32 {kind}", torch.float32, rows, "tf32", U_TENSOR_CORE)
        yield Unit(f"e4m3 {kind}", E4M3, rows, "ieee", U_E4M3)
        yield Unit(f"float32 ieee, {rows} rows", torch.float32, rows, "ieee", U)


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


def tf32_operands(device: torch.device) -> Iterator[Row]:
    """How far tf32 moves an operand: 2**-11 if it rounds, 2**-10 if it drops the low bits."""
    for rows, kind in ((16, "mma"), (64, "wgmma")):
        unit = Unit(f"tf32 {kind}", torch.float32, rows, "tf32", U_TENSOR_CORE)
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
