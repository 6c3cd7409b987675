"""What a captured operation keeps of a tensor: an address, not the tensor. And what became of the memory there."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .errors import DanglingPointer, NotEmulated
from .memory import Segment, find_segment

_BARE: Any = ctypes.c_char


class Memory:
    """One storage as a capture met it: its bytes by address, without keeping them alive.

    Memory of a pool stays valid as long as the pool does, whoever uses the block by then; any other memory is valid
    as long as its storage lives and has not moved.
    """

    def __init__(self, storage: torch.UntypedStorage, user: str) -> None:
        self.user = user  # the first operation of the graph that points here
        self.address, self.num_bytes = storage.data_ptr(), storage.nbytes()
        segment = find_segment(self.address)
        self._segment: weakref.ref[Segment] | None = None if segment is None else weakref.ref(segment)
        self._storage = None if segment is not None else StorageWeakRef(storage)
        array = (_BARE * self.num_bytes).from_address(self.address)
        self.bytes: torch.UntypedStorage = torch.frombuffer(array, dtype=torch.uint8).untyped_storage()

    def is_valid(self) -> bool:
        if self._segment is not None:
            return self._segment() is not None
        assert self._storage is not None
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return storage is not None and storage.data_ptr() == self.address and storage.nbytes() >= self.num_bytes


class Pointers:
    """The addresses that one graph keeps."""

    def __init__(self) -> None:
        self._memories: dict[tuple[int, int], Memory] = {}  # by address and size

    def freeze(self, tensor: Tensor, user: str) -> Tensor:
        """`tensor` by address: same dtype, shape and strides over the same bytes, which it does not keep alive."""
        _require_plain(tensor, user)
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        memory = self._find(storage, user)
        with torch.inference_mode(False):  # a replay may write to it from outside of that mode
            alias = torch.empty(0, dtype=tensor.dtype)
            return alias.set_(memory.bytes, tensor.storage_offset(), tensor.size(), tensor.stride())

    def check(self) -> None:
        """Raise DanglingPointer, naming the first operation that uses it, if memory of the graph is gone."""
        for memory in self._memories.values():
            if not memory.is_valid():
                raise DanglingPointer(
                    f"{memory.user}: the {memory.num_bytes} bytes that it points to were freed or moved after the "
                    "capture; CUDA would read whatever is there now"
                )

    def _find(self, storage: torch.UntypedStorage, user: str) -> Memory:
        key = (storage.data_ptr(), storage.nbytes())
        memory = self._memories.get(key)
        if memory is None:
            memory = self._memories[key] = Memory(storage, user)
        return memory


def _require_plain(tensor: Tensor, user: str) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise NotEmulated(f"{user}: tensors of the class {type(tensor).__name__} are not emulated")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
        raise NotEmulated(f"{user}: a {tensor.layout} tensor on {tensor.device} is not emulated, only strided CPU ones")
    if tensor.is_conj() or tensor.is_neg():
        raise NotEmulated(f"{user}: tensors that are conjugated or negated when they are read are not emulated")
