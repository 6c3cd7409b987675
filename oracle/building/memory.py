"""What tensors lie in: guard bands around everything, small inputs in one transfer.

A tensor is a view into memory of integers that belongs to it alone, between two bands of guard bytes; with odd
strides the gaps between its rows are guard bytes too. A candidate that writes where it should not changes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..case import Case
from ..formats import INTEGERS, torch_dtype
from .guards import Watch
from .layouts import Layout, cache_layouts
from .poison import fill_pool_, guard_bits

BAND_BYTES = 8192


def place(
    case: Case, layouts: Sequence[Layout], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Guarded memory that holds these layouts, as integers, and their views in `dtype`: all guard bytes as yet."""
    memory, views = _reserve(layouts, dtype, device)
    memory.fill_(guard_bits(case, dtype.itemsize))
    return memory, views


def _reserve(layouts: Sequence[Layout], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """The same, holding whatever lay there."""
    band = BAND_BYTES // dtype.itemsize
    end = max(layout.end for layout in layouts)
    memory = torch.empty(band + (end + 15) // 16 * 16 + band, dtype=INTEGERS[dtype.itemsize], device=device)
    floats = memory.view(dtype)
    return memory, [layout.view(floats, band) for layout in layouts]


@dataclass(frozen=True)
class Pools:
    """The caches of a case, by name, and the memory that holds them."""

    caches: dict[str, Tensor]
    memories: list[Tensor]  # integers; K and V that are interleaved or sliced share one
    watches: list[Watch]


def place_pools(case: Case, num_blocks: int, dtype: torch.dtype, device: torch.device, *, writable: bool) -> Pools:
    """k_cache and v_cache, or latent_cache, filled with the poison of pages that nobody owns.

    Pages that are far apart are filled and watched themselves: what lies between them is never touched, and
    there is nothing to watch of one that may be written.
    """
    spec = case.spec
    names = ["latent_cache"] if spec.is_mla else ["k_cache", "v_cache"]
    sizes = [spec.head_size + spec.rope_head_size] if spec.is_mla else [spec.head_size, spec.head_size_v]
    pools = Pools({}, [], [])
    for layouts in cache_layouts(case, num_blocks, sizes):
        here = names[len(pools.caches) :][: len(layouts)]
        if spec.far_pages:
            whole = torch.empty(max(layout.end for layout in layouts), dtype=INTEGERS[dtype.itemsize], device=device)
            memories = [layout.view(whole, 0) for layout in layouts]
            views = [memory.view(dtype) for memory in memories]
            watches = [] if writable else [Watch(name, memory) for name, memory in zip(here, memories, strict=True)]
        else:
            whole, views = _reserve(layouts, dtype, device)  # the bands are filled as the pages are
            memories = [whole]
            watches = [Watch(" and ".join(here), whole, dict(zip(here, views, strict=True)), writable)]
        for memory in memories:
            fill_pool_(memory, case, dtype)
        pools.caches.update(zip(here, views, strict=True))
        pools.memories.extend(memories)
        pools.watches.extend(watches)
    return pools


class Pack:
    """Small host arrays that go to the device together, each in its own place between guard words."""

    _GAP = 16  # words; every array starts on 64 bytes

    def __init__(self, case: Case) -> None:
        self._guard = guard_bits(case, 4)
        self._parts: dict[str, tuple[int, NDArray[np.generic]]] = {}
        self._words = self._GAP

    def add(self, name: str, values: NDArray[np.generic]) -> None:
        """An array of int32, float32 or int64."""
        self._parts[name] = (self._words, values)
        words = values.nbytes // 4
        self._words += -(-words // self._GAP) * self._GAP + self._GAP

    def send(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """The int32 memory on the device and a view of every array in it, with its shape and dtype."""
        host = np.full(self._words, self._guard, dtype=np.int32)
        for start, values in self._parts.values():
            host[start : start + values.nbytes // 4] = np.ascontiguousarray(values).reshape(-1).view(np.int32)
        memory = torch.from_numpy(host).to(device, non_blocking=True)  # staged at once, so `host` may go
        views = {}
        for name, (start, values) in self._parts.items():
            dtype = torch_dtype(str(values.dtype))
            words = memory[start : start + values.nbytes // 4]
            views[name] = words.view(dtype).view(values.shape)
        return memory, views
