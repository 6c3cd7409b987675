"""A captured sequence of operations over frozen addresses."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import ReplayError
from .leaves import leaves
from .memory import Pool, poison
from .pointers import Pointers


class Operation(Protocol):
    """One step of a replay."""

    name: str

    def run(self) -> None:
        """Do it on what the memory holds now."""


class Node:
    """One operator of torch. Its numbers are what they were; its tensors are addresses."""

    def __init__(self, name: str, func: Any, args: Any, kwargs: Any, targets: list[Tensor | None]) -> None:
        self.name = name
        self._func, self._args, self._kwargs = func, args, kwargs
        self._targets = targets if any(target is not None for target in targets) else []

    def run(self) -> None:
        results = self._func(*self._args, **self._kwargs)
        if not self._targets:
            return
        for target, leaf in zip(self._targets, leaves(results), strict=True):
            if target is not None:
                target.copy_(leaf)


class Tape:
    """What one capture recorded, and the pool that its memory comes from."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.pointers = Pointers()
        self.operations: list[Operation] = []

    def append(self, operation: Operation) -> None:
        self.operations.append(operation)

    def allocate(self, like: Tensor) -> Tensor:
        """Memory of the pool for a tensor of these sizes, strides and dtype, unwritten: all NaN or largest values."""
        num_bytes = like.untyped_storage().nbytes()
        if num_bytes == 0:
            return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype)
        flat = self.pool.allocate(num_bytes).view(like.dtype)
        flat.fill_(poison(like.dtype))
        return flat.as_strided(like.size(), like.stride(), like.storage_offset())

    def run(self) -> None:
        self.pointers.check()
        for index, operation in enumerate(self.operations):
            try:
                operation.run()
            except Exception as error:
                place = f"operation {index} of {len(self.operations)}, {operation.name}"
                raise ReplayError(f"{place}: {error}") from error
