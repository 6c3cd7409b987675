"""Where tensors lie: strides packed or odd, guard bands around everything, small inputs in one transfer.

A tensor is a view into memory of integers that belongs to it alone, between two bands of guard bytes; with odd
strides the gaps between its rows are guard bytes too. A candidate that writes where it should not changes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..case import Case
from ..formats import INTEGERS, torch_dtype
from .guards import Watch, extent
from .poison import fill_pool_, guard_bits

BAND_BYTES = 8192
_FAR = 2**31
_STRIDE_OF_SIZE_ONE = 1_000_003  # a dimension of one element may carry any stride


@dataclass(frozen=True)
class Layout:
    """How one tensor lies in its memory: shape and strides in elements, and where its first element is."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int = 0

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + extent(self.shape, self.strides)

    def view(self, memory: Tensor, base: int) -> Tensor:
        return memory.as_strided(self.shape, self.strides, base + self.start)

    def with_odd_singles(self) -> Layout:
        """Strides that mean nothing, in the dimensions where no stride means anything (never the last)."""
        inner = zip(self.shape[:-1], self.strides[:-1], strict=True)
        strides = tuple(_STRIDE_OF_SIZE_ONE if n == 1 else stride for n, stride in inner)
        return Layout(self.shape, strides + self.strides[-1:], self.start)


def row_layout(case: Case, shape: tuple[int, ...], *, misaligned: bool = False) -> Layout:
    """[tokens, heads, dim] or [tokens, dim]. Odd: a slice of wider rows, as of a fused projection.

    Misaligned rows are of an odd width and start one element late, so that no row lies on 16 bytes.
    """
    heads, dim = prod(shape[1:-1]), shape[-1]
    pad = (3 if misaligned else 16) if case.spec.odd_strides else 0
    head_stride = dim + (pad if misaligned else 0)
    token_stride = heads * head_stride + 2 * pad
    strides = (token_stride, head_stride, 1) if len(shape) == 3 else (token_stride, 1)
    if not case.spec.odd_strides:
        return Layout(shape, strides)
    return Layout(shape, strides, int(misaligned)).with_odd_singles()


def cache_layouts(case: Case, num_blocks: int, sizes: Sequence[int]) -> list[list[Layout]]:
    """The layouts of k_cache and v_cache, or of latent_cache, grouped by the memory they lie in."""
    spec = case.spec
    if spec.is_mla:
        return [[_cache(case, num_blocks, sizes[0], heads=0, pad=16)]]
    if spec.cache_layout != "interleaved":
        return [
            [_cache(case, num_blocks, size, heads=spec.num_kv_heads, pad=pad)]
            for size, pad in zip(sizes, (16, 5), strict=True)
        ]
    wide = _cache(case, num_blocks, max(sizes), heads=spec.num_kv_heads, pad=16, halves=2)
    half = wide.strides[0] // 2
    return [[Layout((*wide.shape[:-1], size), wide.strides, i * half) for i, size in enumerate(sizes)]]


def _cache(case: Case, num_blocks: int, size: int, *, heads: int, pad: int, halves: int = 1) -> Layout:
    """[num_blocks, block_size, heads, size], or without heads; strides from the innermost dimension outwards."""
    spec = case.spec
    pad = pad if spec.odd_strides else 0
    row = size + pad
    if spec.cache_layout == "HND" and heads:
        slot, head = row, spec.block_size * row + pad
        page = heads * head
    else:
        head, slot = row, (heads or 1) * row + (pad if heads else 0)
        page = spec.block_size * slot
    page = halves * (page + pad)
    if spec.far_pages:
        page = max(page, _FAR * 3 // (2 * num_blocks) // 16 * 16 + (2 * pad if halves == 2 else pad))
    shape = (num_blocks, spec.block_size, heads, size) if heads else (num_blocks, spec.block_size, size)
    strides = (page, slot, head, 1) if heads else (page, slot, 1)
    layout = Layout(shape, strides)
    return layout.with_odd_singles() if spec.odd_strides else layout


def place(
    case: Case, layouts: Sequence[Layout], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Guarded memory that holds these layouts, as integers, and their views in `dtype`: all guard bytes as yet."""
    integers = INTEGERS[dtype.itemsize]
    band = BAND_BYTES // dtype.itemsize
    end = max(layout.end for layout in layouts)
    memory = torch.empty(band + (end + 15) // 16 * 16 + band, dtype=integers, device=device)
    memory.fill_(guard_bits(case, dtype.itemsize))
    floats = memory.view(dtype)
    return memory, [layout.view(floats, band) for layout in layouts]


@dataclass(frozen=True)
class Pools:
    """The caches of a case, by name, and the memory that holds them."""

    caches: dict[str, Tensor]
    memories: list[Tensor]  # integers; an interleaved K and V share one
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
            whole, views = place(case, layouts, dtype, device)
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
