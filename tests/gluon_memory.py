"""The memory that gluon_emulation.py works on: tensors, pointers, swizzled shared memory, and barriers."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import torch

PATIENCE = 20.0  # seconds at a barrier, after which it is a deadlock
COLUMNS = 64  # of a swizzled row: the columns of a tile lie in blocks of so many, one after the other


class Block(torch.Tensor):
    """A tensor that has Triton's name for what it knows of its layout, which is nothing here."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(layout=None)


def block(value: Any) -> Block:
    return torch.as_tensor(value).as_subclass(Block)


class Pointer:
    """Into a tensor's memory, counted in elements."""

    def __init__(self, base: torch.Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, offset

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.base.dtype)

    def __add__(self, distance: Any) -> Pointer:
        return Pointer(self.base, self.offset + distance)

    def to(self, _dtype: Any, *, bitcast: bool) -> Pointer:
        """The address as a number, which nobody computes with."""
        assert bitcast
        return self

    def memory(self) -> torch.Tensor:
        size = self.base.untyped_storage().nbytes() // self.base.element_size() - self.base.storage_offset()
        return self.base.as_strided((size,), (1,))


class Shared:
    """Shared memory as a tile [.., rows, columns] of it; elements of one swizzled row lie side by side."""

    def __init__(self, memory: torch.Tensor, shape: tuple[int, ...], start: int = 0, transposed: bool = False) -> None:
        self.memory, self.shape, self.start, self.transposed = memory, shape, start, transposed

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    def index(self, place: Any) -> Shared:
        assert 0 <= int(place) < self.shape[0]
        return Shared(self.memory, self.shape[1:], self.start + int(place) * torch.Size(self.shape[1:]).numel())

    def slice(self, start: int, size: int, dim: int) -> Shared:
        """One block of columns."""
        assert (dim, size, start % COLUMNS, len(self.shape)) == (1, COLUMNS, 0, 2)
        return Shared(self.memory, (self.shape[0], size), self.start + start * self.shape[0])

    def permute(self, order: tuple[int, int]) -> Shared:
        assert order == (1, 0)
        return Shared(self.memory, self.shape, self.start, transposed=True)

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        assert dtype == self.dtype
        return Shared(self.memory, tuple(shape), self.start)

    def places(self) -> torch.Tensor:
        if len(self.shape) == 1:
            return self.start + torch.arange(self.shape[0])
        columns = self.shape[-1]  # of whatever dimensions, rows lie one after the other
        rows = torch.Size(self.shape[:-1]).numel()
        row, column = torch.arange(rows)[:, None], torch.arange(columns)
        return self.start + (column // COLUMNS * rows + row) * COLUMNS + column % COLUMNS

    def load(self, layout: Any = None) -> Block:
        found = self.memory[self.places()]
        return block(found.T if self.transposed else found)

    def store(self, value: torch.Tensor) -> None:
        assert value.dtype == self.dtype
        self.memory[self.places()] = value.as_subclass(torch.Tensor)


class Barrier:
    """An mbarrier: a phase ends when `count` have arrived and all bytes that were announced have come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.phase = 0

    def update(self, *, arrivals: int = 0, announced: int = 0, came: int = 0) -> None:
        with self.changed:
            self.bytes += announced - came
            self.missing -= arrivals
            assert self.missing >= 0
            assert self.bytes >= 0
            if self.missing == self.bytes == 0:
                self.missing = self.count
                self.phase ^= 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase != parity, PATIENCE):
                raise TimeoutError("a barrier that nobody opens")


class Barriers(list[Barrier]):
    def index(self, place: Any) -> Any:  # type: ignore[override]
        return self[int(place)]
