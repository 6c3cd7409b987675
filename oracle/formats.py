"""Number formats by name, by size and as integers: what every part of the oracle needs to know of them."""

from __future__ import annotations

import torch

FLOAT8_LARGEST = 448.0  # of float8_e4m3fn; what is stored saturates there

# By element size: to compare, fill and index any tensor bit by bit.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that a case calls `name`, "bfloat16" and the like."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def name_of(dtype: torch.dtype | str) -> str:
    """The other way; a name stays what it is."""
    return str(dtype).removeprefix("torch.")
