"""What lies where nobody may look: the poison of each tier, and the bits that outputs are born with.

| tier | what it fills | where the tier is off |
|---|---|---|
| a | every slot of pages that no request owns, page 0 among them, and unused table entries | finite; entries 0 |
| b | slots past a request's length, in its last page | finite |
| c | keys that no row of any request which owns the page may see; parts of a merge that are empty | finite |
| d | outputs, guard bands, padding rows, query bias of keys that do not exist | outputs 0, the rest finite |
| e | float8 caches: NaN and the largest number by turns | the largest number only |

Poison is a NaN of all ones; outputs are born with another NaN, so that what was never written is not mistaken
for what was computed from poison. float8_e4m3fn has two NaNs: 0x7F is poison and 0xFF unwritten.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..case import FLOAT8, Case
from ..formats import INTEGERS
from .pages import Bools, Ints, Pages

_SENTINELS = {
    torch.float64: 0x7FF8A5A55A5AA5A5,
    torch.float32: 0x7FE5A5A5,
    torch.float16: 0x7F5A,
    torch.bfloat16: 0x7FE5,
    torch.float8_e4m3fn: 0xFF,
}
_FINITE = 3e4  # where NaN is not asked for: large enough to be seen in any sum
_FLOAT8_NAN_BITS = 0x7F
_FLOAT8_LARGEST_BITS = 0x7E
_FINITE_GUARD = 0x2A  # every byte of a guard band without tier d: a small number in any format

UNOWNED, TAIL, HIDDEN, READABLE = range(4)
_TIER_OF_CLASS = {UNOWNED: "a", TAIL: "b", HIDDEN: "c"}


def sentinel_bits(dtype: torch.dtype) -> int:
    """The NaN that an output of this dtype is born with, as the integer of the same size."""
    return _SENTINELS[dtype]


def is_unwritten(tensor: Tensor) -> Tensor:
    """bool, of the tensor's shape: which elements still have the bits that an output is born with."""
    return tensor.view(INTEGERS[tensor.element_size()]) == sentinel_bits(tensor.dtype)


def guard_byte(case: Case) -> int:
    """What every byte around a tensor is: together they are a NaN in every format, and -1 as an index."""
    return 0xFF if "d" in case.poison else _FINITE_GUARD


def guard_bits(case: Case, itemsize: int) -> int:
    """The same as a signed integer of this many bytes (unsigned for one byte)."""
    return int.from_bytes(bytes([guard_byte(case)]) * itemsize, "little", signed=itemsize > 1)


def slot_bits(case: Case, slot_class: int, dtype: torch.dtype) -> int:
    """What an element of a slot that may not be read holds, as the integer of the dtype's size."""
    nan = _TIER_OF_CLASS[slot_class] in case.poison
    if dtype == torch.float8_e4m3fn:
        return _FLOAT8_NAN_BITS if nan and "e" in case.poison else _FLOAT8_LARGEST_BITS
    if nan:
        return -1
    return int(torch.tensor(_FINITE, dtype=dtype).view(INTEGERS[dtype.itemsize]))


def hides_nan(case: Case) -> bool:
    """Whether the slot of a key that nobody may see holds a NaN."""
    return _TIER_OF_CLASS[HIDDEN] in case.poison and ("e" in case.poison or case.spec.kv_dtype != FLOAT8)


def fill_pool_(memory: Tensor, case: Case, dtype: torch.dtype) -> None:
    """Fill a pool's integers, of any shape and strides, as the slots of pages that nobody owns."""
    bits = slot_bits(case, UNOWNED, dtype)
    memory.fill_(bits)
    if dtype == torch.float8_e4m3fn and bits == _FLOAT8_NAN_BITS:
        memory[..., 1::2].fill_(_FLOAT8_LARGEST_BITS)


@dataclass(frozen=True)
class Slots:
    """Which slots of the pool hold a key that some request may see, and what becomes of the others."""

    written: Ints  # [num_written]: slots that may be read, ascending
    key_of_written: Ints  # [num_written]: the logical key whose values lie there
    written_of_key: Ints  # [num_keys]: where a logical key is among `written`; -1 if nobody may read its slot
    repoisoned: dict[int, Ints]  # slot class -> slots whose poison is not the one the pool is filled with


def classify(case: Case, pages: Pages, readable: Bools) -> Slots:
    """A slot that any request sharing it may see is written, and its values are those of its first owner."""
    block_size = case.spec.block_size
    classes = np.zeros(pages.num_blocks * block_size, dtype=np.uint8)
    tails = [
        np.arange(length % block_size, block_size) + int(pages.block_table[r, length // block_size]) * block_size
        for r, length in enumerate(case.batch.seq_lens)
        if length % block_size
    ]
    for slots in tails:
        classes[slots] = TAIL
    classes[pages.slot_of_key] = HIDDEN
    classes[pages.slot_of_key[readable]] = READABLE
    first_owner = np.zeros(classes.shape, dtype=np.int64)
    first_owner[pages.slot_of_key[::-1]] = np.arange(len(pages.slot_of_key))[::-1]  # the last assignment stands
    written = np.flatnonzero(classes == READABLE)
    order = np.full(classes.shape, -1, dtype=np.int64)
    order[written] = np.arange(len(written))
    return Slots(written, first_owner[written], order[pages.slot_of_key], _repoisoned(case, classes))


def _repoisoned(case: Case, classes: NDArray[np.uint8]) -> dict[int, Ints]:
    unowned = _TIER_OF_CLASS[UNOWNED] in case.poison
    wanted = [c for c in (TAIL, HIDDEN) if (_TIER_OF_CLASS[c] in case.poison) != unowned]
    return {slot_class: np.flatnonzero(classes == slot_class) for slot_class in wanted}
