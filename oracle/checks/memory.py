"""Changed copies of arguments: other values, the same strides and alignment, so that the same kernel serves them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..building.guards import extent
from ..building.layouts import cache_layouts
from ..building.memory import place
from ..building.pages import HUGE_PAGE
from ..building.poison import guard_bits, sentinel_bits
from ..case import Case
from ..formats import INTEGERS


def bits_of(tensor: Tensor) -> Tensor:
    """The tensor's elements as integers: what every device can index, fill and compare, float8 too."""
    return tensor.view(INTEGERS[tensor.element_size()])


def bits_of_number(value: float, like: Tensor) -> int:
    """The integer that has the bits of a number in the dtype of `like`; made on the host."""
    return int(bits_of(torch.tensor(value).to(like.dtype)))


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in memory of their own, the bytes around them included; what shared memory shares it again."""
    memories: dict[int, Tensor] = {}
    copied = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in memories:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            memories[storage.data_ptr()] = whole.clone()
        memory = memories[storage.data_ptr()].view(tensor.dtype)
        copied[name] = memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return copied


def resized(tensors: Mapping[str, Tensor], rows: int, case: Case) -> dict[str, Tensor]:
    """Guard bytes with `rows` entries in the first dimension, otherwise placed as the tensors are."""
    ends: dict[int, int] = {}
    for tensor in tensors.values():
        key = tensor.untyped_storage().data_ptr()
        end = int(tensor.storage_offset()) + extent((rows, *tensor.shape[1:]), tensor.stride())
        ends[key] = max(end, ends.get(key, 0))
    memories: dict[int, Tensor] = {}
    made = {}
    for name, tensor in tensors.items():
        key = tensor.untyped_storage().data_ptr()
        if key not in memories:
            integers, bits = INTEGERS[tensor.element_size()], guard_bits(case, tensor.element_size())
            memories[key] = torch.full((ends[key],), bits, dtype=integers, device=tensor.device)
        memory = memories[key].view(tensor.dtype)
        made[name] = memory.as_strided((rows, *tensor.shape[1:]), tensor.stride(), tensor.storage_offset())
    return made


def unwritten_like(tensor: Tensor, rows: int | None, case: Case) -> Tensor:
    """An output of so many rows in which every element has the bits that an output is born with."""
    fresh = resized({"": tensor}, tensor.shape[0] if rows is None else rows, case)[""]
    bits_of(fresh).fill_(sentinel_bits(tensor.dtype))
    return fresh


def gathered_rows(tensors: Mapping[str, Tensor], index: Tensor, case: Case) -> dict[str, Tensor]:
    """Tensors [rows, ...] made of the rows `index` [new rows] int64 of the given ones."""
    made = resized(tensors, index.shape[0], case)
    for name, tensor in tensors.items():
        bits_of(made[name]).copy_(bits_of(tensor)[index])
    return made


def gathered_slots(caches: Mapping[str, Tensor], slots: Tensor, case: Case) -> dict[str, Tensor]:
    """Caches whose slot (block, offset) holds the old slot `slots` [new blocks, block_size] int64.

    They are laid out anew: where pages are not outermost, other strides depend on how many there are.
    """
    like = next(iter(caches.values()))
    made: dict[str, Tensor] = {}
    for layouts in cache_layouts(case, slots.shape[0], [cache.shape[-1] for cache in caches.values()]):
        _, views = place(case, layouts, like.dtype, like.device)
        made.update(zip(list(caches)[len(made) :], views, strict=False))
    for name, cache in caches.items():
        block_size = cache.shape[1]
        bits_of(made[name]).copy_(bits_of(cache)[slots // block_size, slots % block_size])
    return made


def sent(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A host array on the device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def sent_table(table: NDArray[np.integer], like: Tensor) -> Tensor:
    """A block table [requests, columns] as int32, with the row pitch of the table `like`."""
    pitch = max(like.stride(0), table.shape[1])
    wide = np.full((table.shape[0], pitch), HUGE_PAGE, dtype=np.int32)
    wide[:, : table.shape[1]] = table
    return sent(wide, like.device)[:, : table.shape[1]]
