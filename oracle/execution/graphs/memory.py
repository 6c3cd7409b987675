"""The memory that emulated captures allocate from, reused the way CUDA's caching allocator reuses it.

A block is rounded up to 512 bytes and cut from a segment; when the last tensor over it dies it goes back, joined to its
free neighbours, and the smallest free block that is large enough serves the next request. Nothing waits for anything:
within one stream, memory may be handed out again as soon as nobody holds it.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROUNDING = 512
SEGMENT = 2 << 20


@dataclass(eq=False)
class Segment:
    """Memory in one piece, and which ranges of it (start -> length, in bytes) nobody uses."""

    memory: NDArray[np.uint8]
    free: dict[int, int] = field(default_factory=dict)
    reached: int = 0  # where the last byte ends that was ever handed out

    @classmethod
    def of(cls, num_bytes: int) -> Segment:
        spare = np.empty(num_bytes + ROUNDING, dtype=np.uint8)
        start = -spare.ctypes.data % ROUNDING
        segment = cls(spare[start : start + num_bytes], {0: num_bytes})
        _segments.add(segment)
        return segment

    @property
    def address(self) -> int:
        return self.memory.ctypes.data

    def take(self, start: int, num_bytes: int) -> None:
        self.reached = max(self.reached, start + num_bytes)
        left = self.free.pop(start) - num_bytes
        if left:
            self.free[start + num_bytes] = left

    def give_back(self, start: int, num_bytes: int) -> None:
        num_bytes += self.free.pop(start + num_bytes, 0)
        before = next((left for left, length in self.free.items() if left + length == start), None)
        if before is not None:
            start, num_bytes = before, num_bytes + self.free[before]
        self.free[start] = num_bytes


_segments: weakref.WeakSet[Segment] = weakref.WeakSet()


class Pool:
    """What the captures of one pool share. Lives as long as a graph, a tensor or the caller holds it."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        # Tensors die at any moment, also inside of `allocate`: what dies is only noted, and collected later.
        self._returned: deque[tuple[Segment, int, int]] = deque()

    def allocate(self, num_bytes: int) -> Tensor:
        """`num_bytes` (at least 1) as a uint8 tensor that is alone in its storage."""
        rounded = -(-num_bytes // ROUNDING) * ROUNDING
        segment, start = self._find(rounded)
        segment.take(start, rounded)
        handle = segment.memory[start : start + num_bytes]
        # The storage made from the array keeps it alive, and nothing else does: it dies with its last tensor.
        weakref.finalize(handle, self._returned.append, (segment, start, rounded)).atexit = False
        return torch.from_numpy(handle)

    def _find(self, num_bytes: int) -> tuple[Segment, int]:
        while self._returned:
            segment, start, length = self._returned.popleft()
            segment.give_back(start, length)
        fits = [
            (length, index, start)
            for index, segment in enumerate(self.segments)
            for start, length in segment.free.items()
            if length >= num_bytes
        ]
        if fits:
            _, index, start = min(fits)
            return self.segments[index], start
        self.segments.append(Segment.of(-(-num_bytes // SEGMENT) * SEGMENT))
        return self.segments[-1], 0


def find_segment(address: int) -> Segment | None:
    """The segment of any pool that holds `address`."""
    for segment in _segments:
        if segment.address <= address < segment.address + segment.memory.nbytes:
            return segment
    return None


def poison(dtype: torch.dtype) -> Any:
    """What fresh memory of `dtype` holds: NaN, or the largest value, which is no index and no length."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max
