"""Whether a candidate left alone what is not its own: the bytes around every tensor, and all it may only read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..formats import INTEGERS


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements of memory lie from a tensor's first element to its last; 0 if it has none."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


@dataclass(frozen=True)
class Watch:
    """Memory that is looked after: integers of any shape, and the named tensors that lie in it.

    Without `tensors` the memory is a tensor itself, and `name` its name. The elements of a `writable` watch's
    tensors are the candidate's to change; the bytes around and between them are not.
    """

    name: str
    memory: Tensor
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    writable: bool = False


@dataclass(frozen=True)
class Guards:
    """A set of watches and what their memory held when they were set."""

    watches: tuple[Watch, ...]
    before: tuple[Tensor, ...]

    @staticmethod
    def over(watches: Sequence[Watch]) -> Guards:
        """Remember every byte as it is now."""
        return Guards(tuple(watches), tuple(watch.memory.clone() for watch in watches))

    def violations(self) -> str | None:
        """Which tensor or guard band changed and where it did first, in one sentence; None if nothing changed."""
        pairs = [(w, _without_outputs(w, before), before) for w, before in zip(self.watches, self.before, strict=True)]
        if not pairs:
            return None
        changed = torch.stack([(now != before).any() for _, now, before in pairs]).tolist()
        first = next((pair for pair, bad in zip(pairs, changed, strict=True) if bad), None)
        return None if first is None else _describe(*first)


def _without_outputs(watch: Watch, before: Tensor) -> Tensor:
    """The memory as it is now, with what the candidate may write put back."""
    if not watch.writable:
        return watch.memory
    now = watch.memory.clone()
    for tensor in watch.tensors.values():
        _same_place(tensor, now).copy_(_same_place(tensor, before))
    return now


def _describe(watch: Watch, now: Tensor, before: Tensor) -> str:
    if not watch.tensors:
        return _element(watch.name, now, before)
    for name, tensor in watch.tensors.items():
        mine, old = (_same_place(tensor, memory) for memory in (now, before))
        if bool((mine != old).any()):
            return _element(name, mine, old)
    offset = int((now != before).nonzero()[0, 0])
    found, held = int(now[offset]), int(before[offset])
    name, where = _nearest(watch, offset)
    return f"a guard byte {where} {name} changed: {_hex(held, now)} became {_hex(found, now)}"


def _element(name: str, now: Tensor, before: Tensor) -> str:
    index = tuple(int(i) for i in (now != before).nonzero()[0])
    found, held = int(now[index]), int(before[index])
    at = f"[{', '.join(str(i) for i in index)}]"
    return f"{name} is only to be read and changed: element {at} was {_hex(held, now)} and is {_hex(found, now)}"


def _nearest(watch: Watch, offset: int) -> tuple[str, str]:
    """The tensor that the element of memory is next to, and where from it; `inside` is a gap between rows."""
    distances = []
    for name, tensor in watch.tensors.items():
        scale = watch.memory.element_size()
        first = tensor.storage_offset() * tensor.element_size() // scale
        last = first + -(-extent(tensor.shape, tensor.stride()) * tensor.element_size() // scale) - 1
        if offset < first:
            distances.append((first - offset, name, f"{first - offset} elements before"))
        elif offset > last:
            distances.append((offset - last, name, f"{offset - last} elements after the end of"))
        else:
            distances.append((0, name, "between the rows of"))
    _, name, where = min(distances)
    return name, where


def _same_place(tensor: Tensor, memory: Tensor) -> Tensor:
    """The integers of `memory`, the watched memory or a copy of it, that lie where the tensor does."""
    integers = INTEGERS[tensor.element_size()]
    return memory.view(integers).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _hex(value: int, memory: Tensor) -> str:
    digits = 2 * memory.element_size()
    return f"0x{value % (1 << 4 * digits):0{digits}X}"
