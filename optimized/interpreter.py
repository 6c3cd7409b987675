"""Triton's interpreter, made to compute what the hardware computes.

Up to Triton 3.9 the interpreter keeps bfloat16 and float8 values as bare bit patterns and gets three things wrong:
`tl.dot` multiplies the patterns, casts to these formats truncate (and overflow to nonsense), and with numpy >= 2.4
Triton 3.6 cannot take `range()` of a loaded value. `install` replaces those three places; `probe` says what this
installation of Triton does without and with the repair. Arithmetic on bfloat16 tensors (`a + b`) stays wrong: kernels
here widen every value when they load it, and a test holds them to that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret

_TORCH_FORMATS = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_NARROW = (tl.bfloat16, tl.float8e4nv, tl.float8e5)


def _is_repairable(source: Any, target: Any) -> bool:
    return (source in _NARROW or target in _NARROW) and source in _TORCH_FORMATS and target in _TORCH_FORMATS


def convert(data: np.ndarray[Any, Any], source: Any, target: Any) -> np.ndarray[Any, Any]:
    """Convert between float formats as the hardware does: to nearest even, float8 saturating, NaN stays NaN."""
    values = torch.from_numpy(np.ascontiguousarray(data)).view(_TORCH_FORMATS[source]).to(torch.float32)
    if target in (tl.float8e4nv, tl.float8e5):
        limit = torch.finfo(_TORCH_FORMATS[target]).max
        values = values.clamp(-limit, limit)
    result = values.to(_TORCH_FORMATS[target])
    patterns = {1: torch.uint8, 2: torch.uint16}.get(result.element_size())
    keeps_pattern = target in _NARROW and patterns is not None
    return (result.view(patterns) if keeps_pattern else result).numpy()  # type: ignore[arg-type]


def _repaired_cast(original: Any) -> Any:
    def cast(self: Any, src: Any, dst_type: Any, *rest: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if not _is_repairable(source, target):
            return original(self, src, dst_type, *rest)
        return type(src)(convert(src.data, source, target).reshape(src.data.shape), target)

    return cast


def _repaired_dot(original: Any) -> Any:
    def widen(handle: Any) -> Any:
        kind = handle.dtype.scalar
        if kind not in _NARROW:
            return handle
        data = convert(handle.data, kind, tl.float32).reshape(handle.data.shape)
        return type(handle)(data, tl.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return original(self, widen(a), widen(b), d, *rest)

    return dot


def _repaired_index(original: Any) -> Any:
    def patch_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        # numpy >= 2.4 refuses int() of a one-element array that still has a dimension.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    return patch_tensor


_patched: set[int] = set()  # modules whose view of the language is patched for the launch that runs


def _quiet(original: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _patched.clear()
        # inf - inf and 0 * inf are as ordinary inside a kernel here as they are on the hardware.
        with np.errstate(all="ignore"):
            return original(self, *args, **kwargs)

    return call


def _patching_once(interpreter: Any) -> Any:
    """Calls of device functions that patch the language once a launch and module, not at every call: a third faster."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(module)
        return self.rewrite()(*args, **kwargs)

    return call


def install() -> None:
    """Repair the interpreter of this process, once; does nothing where kernels are compiled."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "pageproof_repaired", False):
        return
    builder.cast_impl = _repaired_cast(builder.cast_impl)
    builder.create_fp_to_fp = _repaired_cast(builder.create_fp_to_fp)
    builder.create_dot = _repaired_dot(builder.create_dot)
    interpreter._patch_lang_tensor = _repaired_index(interpreter._patch_lang_tensor)
    interpreter.GridExecutor.__call__ = _quiet(interpreter.GridExecutor.__call__)
    interpreter.InterpretedFunction.__call__ = _patching_once(interpreter)
    builder.pageproof_repaired = True


@triton.jit
def _dot_probe(a, b, out):  # type: ignore[no-untyped-def]
    index = tl.arange(0, 16)
    place = index[:, None] * 16 + index[None, :]
    tl.store(out + place, tl.dot(tl.load(a + place), tl.load(b + place)))


@triton.jit
def _cast_probe(source, out, count):  # type: ignore[no-untyped-def]
    for start in range(0, tl.load(count), 256):
        place = start + tl.arange(0, 256)
        tl.store(out + place, tl.load(source + place).to(out.dtype.element_ty))


def probe() -> list[str]:
    """Run small kernels through the interpreter and say, a line each, what is right; raise if anything is not.

    Returns an empty list where kernels are compiled.
    """
    if not INTERPRETED:
        return []
    lines = [f"Triton {triton.__version__} interpreter, numpy {np.__version__}: repaired casts, dot and ranges"]
    wrong = [*_probe_dots(), *_probe_casts()]
    if wrong:
        raise RuntimeError(f"Triton {triton.__version__}'s interpreter computes wrongly here: {'; '.join(wrong)}")
    lines.append("probe: tl.dot in float32, float16, bfloat16, float8_e4m3fn and casts between them are right")
    return lines


def _probe_dots() -> list[str]:
    wrong = []
    pattern = (torch.arange(256) * 37 % 101 - 50).reshape(16, 16)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        a, b = (pattern / 16).to(dtype), (pattern.T / 32).contiguous().to(dtype)
        out = torch.full((16, 16), float("nan"))
        _dot_probe[(1,)](a, b, out)
        if not torch.allclose(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5):
            wrong.append(f"tl.dot of {dtype}")
    return wrong


def _probe_casts() -> list[str]:
    wrong = []
    # Finite float32 patterns far apart, with low bits set: those are what a truncating cast loses.
    bits = torch.arange(3840, dtype=torch.int32) * 557_041
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    values = torch.cat([bits.view(torch.float32), -bits.view(torch.float32), special, torch.ones(252)])
    count = torch.tensor([values.numel()], dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        out = torch.zeros(values.numel(), dtype=dtype)
        _cast_probe[(1,)](values, out, count)
        limit = torch.finfo(dtype).max
        expected = (values.clamp(-limit, limit) if dtype == torch.float8_e4m3fn else values).to(dtype)
        if not torch.equal(out.float().nan_to_num(nan=1e9), expected.float().nan_to_num(nan=1e9)):
            wrong.append(f"casts to {dtype}")
        back = torch.zeros(values.numel())
        _cast_probe[(1,)](expected, back, count)
        if not torch.equal(back.nan_to_num(nan=1e9), expected.float().nan_to_num(nan=1e9)):
            wrong.append(f"casts from {dtype}")
    return wrong


install()
