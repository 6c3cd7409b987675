"""One wording for every bad argument: which one, what was found, what was expected."""

from __future__ import annotations

import torch
from torch import Tensor


def bad_value(name: str, found: object, expected: str) -> ValueError:
    """`name` has the right type and a value that no operation can mean."""
    return ValueError(f"{name}: found {found}, expected {expected}")


def bad_type(name: str, found: object, expected: str) -> TypeError:
    """`name` is of a type or dtype that the operation does not take."""
    shown = f"{type(found).__name__} {found!r}" if not isinstance(found, (type, torch.dtype)) else str(found)
    return TypeError(f"{name}: found {shown}, expected {expected}")


def check_tensor(
    name: str,
    tensor: object,
    *,
    dims: int | None = None,
    dtypes: tuple[torch.dtype, ...] = (),
    device: torch.device | None = None,
) -> None:
    """Raise unless `tensor` is a tensor of this rank, one of these dtypes and on this device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: found {type(tensor).__name__}, expected a torch.Tensor")
    if dtypes and tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise bad_type(name, tensor.dtype, wanted)
    if dims is not None and tensor.dim() != dims:
        raise bad_value(name, f"shape {tuple(tensor.shape)}", f"{dims} dimension{'s' * (dims > 1)}")
    if device is not None and tensor.device != device:
        raise bad_value(name, f"a tensor on {tensor.device}", f"one on {device} like the other arguments")
