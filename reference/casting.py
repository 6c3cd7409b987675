"""float64 to the stored formats with one rounding, which torch's own cast does not promise.

torch casts float64 to float16, bfloat16 and float8 by way of float32, so a value can be rounded twice: 1 + 2**-8
+ 2**-40 becomes the tie 1 + 2**-8 in float32 and then 1 in bfloat16, where 1 + 2**-7 is nearest. What
exceeds float8_e4m3fn became NaN in older versions of torch and saturates in newer ones; the contract saturates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import FLOAT8

FLOAT8_MAX = 448.0
NARROW = (torch.float16, torch.bfloat16, FLOAT8)


def narrow(values: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """values / scale, any float dtype, rounded once to nearest even; float8_e4m3fn saturates at +-448, NaN stays NaN.

    The division is IEEE in the dtype of `values`; `scale` broadcasts against them.
    """
    if scale is not None:
        values = values / scale.to(values.dtype)
    if dtype == FLOAT8:
        values = values.clamp(-FLOAT8_MAX, FLOAT8_MAX)
    if values.dtype == torch.float64 and dtype in NARROW:
        values = round_to_odd(values)
    return values.to(dtype)


def round_to_odd(values: Tensor) -> Tensor:
    """float64 to float32, inexact values to the neighbour whose last bit is 1.

    That last bit remembers "not exactly here", so rounding once more, to a format at least two bits narrower,
    gives what one rounding from float64 would have given (Boldo and Melquiond, IEEE TC 57(4), 2008).
    """
    single = values.float()
    back = single.double()
    inexact = (back != values) & ~values.isnan()
    bits = single.view(torch.int32)
    towards_zero = bits - (back.abs() > values.abs()).int()
    return torch.where(inexact, towards_zero | 1, bits).view(torch.float32)


def per_query_head(scale: Tensor | None, num_query_heads: int) -> Tensor | None:
    """A scale of one element or one per kv head as [num_query_heads, 1]: a query head takes its kv head's."""
    if scale is None:
        return None
    return scale.reshape(-1).repeat_interleave(num_query_heads // scale.numel())[:, None]
