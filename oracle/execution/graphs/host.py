"""Which memory stands for the host's, and the reads of device memory that never reach torch's dispatcher.

To the emulation a CPU tensor is device memory, except what `pinned` returned and what is made from Python numbers
inside of a capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from .errors import CaptureError

PINNED, PAGEABLE = "pinned", "pageable"

_known: dict[int, tuple[StorageWeakRef, str]] = {}

# What each of these does to a CUDA tensor waits for the device. On a CPU tensor they run no operator at all.
_READS = {getattr(Tensor, name): name for name in ("cpu", "numpy", "tolist", "__array__", "__repr__")}
_FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray}


def prefix(opened: Sequence[str]) -> str:
    """The operators whose bodies are running, in front of the name of what one of them did."""
    return "".join(f"{name} > " for name in opened)


def mark(tensor: Tensor, kind: str) -> None:
    """From now on `tensor`'s memory is the host's."""
    for address, (known, _) in list(_known.items()):
        if known.expired():
            del _known[address]
    storage = tensor.untyped_storage()
    if storage.nbytes():
        _known[storage.data_ptr()] = StorageWeakRef(storage), kind


def kind_of(tensor: Tensor) -> str | None:
    """PINNED or PAGEABLE for host memory, None for what stands for device memory."""
    if not _known:
        return None
    storage, kind = _known.get(tensor.untyped_storage().data_ptr(), (None, None))
    return None if storage is None or storage.expired() else kind


class HostReads(TorchFunctionMode):
    """Refuses the host reads and copies that a CUDA capture refuses and that the dispatcher does not see."""

    def __init__(self, opened: Sequence[str]) -> None:
        super().__init__()
        self._opened = opened  # the operators whose bodies are running, for messages

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        where = prefix(self._opened)
        if func in _READS and kind_of(args[0]) is None:
            raise CaptureError(f"{where}Tensor.{_READS[func]}: found a read of device memory on the host in a capture")
        made_from_python = func in _FROM_PYTHON and not any(isinstance(value, Tensor) for value in args)
        if func is Tensor.new_tensor or (made_from_python and kwargs.get("device") is not None):
            raise CaptureError(
                f"{where}{func.__name__}: found a copy from pageable host memory to the device in a capture"
            )
        return func(*args, **kwargs)
