"""Number formats as the bound sees them: how far one rounding can move a value."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import name_of

# One correctly rounded float32 operation: relative error.
U = 2.0**-24

# Below this magnitude a float32 operation on a GPU may give zero: absolute error.
FLUSH = 2.0**-126

# A float32 operand of a tf32 product loses its low 13 bits. Rounding them would cost 2**-11, but Hopper's
# wgmma reads the operand from shared memory and drops them, which costs twice that.
TF32 = 2.0**-10


@dataclass(frozen=True)
class Format:
    """One rounding to nearest: |rounded - x| <= roundoff * |x| + underflow, unless |x| >= overflow."""

    roundoff: float
    underflow: float  # half the smallest subnormal; float32 may flush instead
    overflow: float  # the smallest magnitude that rounds to infinity


_FORMATS = {
    "float64": Format(2.0**-53, 0.0, float("inf")),
    "float32": Format(U, FLUSH, 2.0**128 - 2.0**103),
    "bfloat16": Format(2.0**-8, FLUSH, 2.0**128 - 2.0**119),
    "float16": Format(2.0**-11, 2.0**-25, 65520.0),
    "float8_e4m3fn": Format(2.0**-4, 2.0**-10, float("inf")),  # every store saturates at FLOAT8_LARGEST
}

EXACT = Format(0.0, 0.0, float("inf"))  # no rounding at all


def format_of(dtype: torch.dtype | str) -> Format:
    """The format of a torch dtype or of its name; a ValueError for one that no kernel here may use."""
    name = name_of(dtype)
    if name not in _FORMATS:
        raise ValueError(f"dtype: found {name}, expected one of {', '.join(_FORMATS)}")
    return _FORMATS[name]
