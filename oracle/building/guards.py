"""Whether a candidate left alone what is not its own: the bytes around every tensor, and all it may only read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..formats import INTEGERS

SMALL_INPUTS = "the small inputs"  # the name of the memory that holds all of them
SMALL_BYTES = 1 << 24
JOINED_BYTES = 1 << 20  # a copy of so many takes no longer than a launch


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements of memory lie from a tensor's first element to its last; 0 if it has none."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


Pair = tuple[Tensor, Tensor]  # of one shape and dtype


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
    """A set of watches and what their memory held when they were set.

    Small memories are remembered end to end and looked at together: on a GPU a launch for each of them costs more
    than all of their bytes. A large one is looked at where it lies.
    """

    watches: tuple[Watch, ...]
    small: Tensor  # uint8: what the small memories held, end to end
    large: tuple[Tensor, ...]  # what each of the others held

    @staticmethod
    def over(watches: Sequence[Watch]) -> Guards:
        """Remember every byte as it is now."""
        small, large = _by_size(watches)
        return Guards(tuple(watches), _end_to_end(small), tuple(watch.memory.clone() for watch in large))

    def pairs(self) -> list[Pair]:
        """What lies in the memories now, and what they held. What the candidate may write is in both as it was."""
        pairs = self.large_pairs()
        return [*pairs, (self.small_now(), self.small)] if len(self.small) else pairs

    def large_pairs(self) -> list[Pair]:
        """The same of the large memories alone."""
        large = _by_size(self.watches)[1]
        return [(_without_outputs(*pair), pair[1]) for pair in zip(large, self.large, strict=True)]

    def small_now(self) -> Tensor:
        """uint8, as `small`: what the small memories hold now; what the candidate may write is as it was."""
        small = _by_size(self.watches)[0]
        now = _end_to_end(small)
        for watch, found, before in zip(small, _apart(now, small), _apart(self.small, small), strict=True):
            if watch.writable:
                _keep_outputs(watch, found, before)
        return now

    def violations(self) -> str | None:
        """Which tensor or guard band changed and where it did first, in one sentence; None if nothing changed."""
        if not differ(self.pairs()):
            return None
        looked_at = ((watch, _without_outputs(watch, before), before) for watch, before in self._remembered())
        return next(_describe(*found) for found in looked_at if bool((found[1] != found[2]).any()))

    def put_back(self) -> None:
        """Make every byte what it was, outputs too."""
        self.put(self.small)
        for watch, before in zip(_by_size(self.watches)[1], self.large, strict=True):
            watch.memory.copy_(before)

    def put(self, small: Tensor) -> None:
        """Make the small memories hold these bytes, as `small_now` gave them."""
        watches = _by_size(self.watches)[0]
        if watches:
            torch._foreach_copy_(_bytes(watches), list(_apart(small, watches)))

    def _remembered(self) -> list[tuple[Watch, Tensor]]:
        """Every watch in the order in which they were set, with what its memory held."""
        small, large = _by_size(self.watches)
        parts = zip([*small, *large], [*_apart(self.small, small), *self.large], strict=True)
        held = {id(watch): before.view(watch.memory.dtype) for watch, before in parts}
        return [(watch, held[id(watch)]) for watch in self.watches]


def differ(pairs: Sequence[Pair]) -> bool:
    """Whether the two of any pair differ. The device is waited for once."""
    return bool(difference(pairs)) if pairs else False


def difference(pairs: Sequence[Pair]) -> Tensor:
    """[] bool: whether the two of any pair, of which there is one, differ. Few launches serve many small pairs."""
    joined = [pair for pair in pairs if pair[0].dim() == 1 and pair[0].nbytes <= JOINED_BYTES]
    alone = [pair for pair in pairs if all(pair is not other for other in joined)]
    if len(joined) > 1:
        found, before = (torch.cat([part.view(torch.uint8) for part in side]) for side in zip(*joined, strict=True))
        joined = [(found, before)]
    flags = [(found != before).any() for found, before in map(_in_words, [*alone, *joined])]
    return torch.stack(flags).any() if len(flags) > 1 else flags[0]


def _in_words(pair: Pair) -> Pair:
    """The bytes as integers of eight, where they are a multiple: an eighth as many to compare."""
    found, before = pair
    whole = found.dtype == torch.uint8 and found.dim() == 1 and found.nbytes % 8 == 0
    return (found.view(torch.int64), before.view(torch.int64)) if whole else pair


def _by_size(watches: Sequence[Watch]) -> tuple[list[Watch], list[Watch]]:
    """The small ones and the others."""
    small = [watch for watch in watches if watch.memory.dim() == 1 and watch.memory.nbytes <= SMALL_BYTES]
    return small, [watch for watch in watches if all(watch is not other for other in small)]


def _end_to_end(watches: Sequence[Watch]) -> Tensor:
    """A copy of their bytes."""
    return torch.cat(_bytes(watches)) if watches else torch.empty(0, dtype=torch.uint8)


def _bytes(watches: Sequence[Watch]) -> list[Tensor]:
    return [watch.memory.view(torch.uint8) for watch in watches]


def _apart(whole: Tensor, watches: Sequence[Watch]) -> tuple[Tensor, ...]:
    """What `_end_to_end` made, the bytes of each memory."""
    return torch.split(whole, [watch.memory.nbytes for watch in watches])


def _without_outputs(watch: Watch, before: Tensor) -> Tensor:
    """The memory as it is now, with what the candidate may write put back."""
    if not watch.writable:
        return watch.memory
    now = watch.memory.clone()
    _keep_outputs(watch, now, before)
    return now


def _keep_outputs(watch: Watch, now: Tensor, before: Tensor) -> None:
    """In a copy of the memory, what the candidate may write as it was."""
    for tensor in watch.tensors.values():
        _same_place(tensor, now).copy_(_same_place(tensor, before))


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
    whole = memory.view(INTEGERS[tensor.element_size()])
    # A watched memory begins its storage; a copy may be a part of a longer one.
    return whole.as_strided(tensor.shape, tensor.stride(), whole.storage_offset() + tensor.storage_offset())


def _hex(value: int, memory: Tensor) -> str:
    digits = 2 * memory.element_size()
    return f"0x{value % (1 << 4 * digits):0{digits}X}"
