"""A case made flesh: the tensors of one call, what it must write, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...reference.problem import Scales
from ..case import Case
from ..formats import FLOAT8_LARGEST
from .guards import Guards
from .hashing import Terms, hashed, host_choice, index_terms, normals, split
from .memory import Pack
from .pages import Ints, Pages
from .poison import Slots
from .rule_values import scales


@dataclass(frozen=True)
class KeySlots:
    """Where the keys of an attention case lie, and which of their slots may be read; on the host."""

    pages: Pages
    slots: Slots


@dataclass(frozen=True)
class Problem:
    """What `tensors.build` makes of a case."""

    case: Case
    arguments: dict[str, Any]  # the operation's keyword arguments, `out` and `lse` included
    outputs: dict[str, Tensor]  # what it must write: out and lse, or the caches; empty for merge_states
    guards: Guards
    pristine: dict[str, Tensor] = field(default_factory=dict)  # copies of caches that are written, from before
    key_slots: KeySlots | None = None  # of attention


class Draws:
    """Normal values of several tensors, asked for on the host and made on the device in one pass."""

    def __init__(self, case: Case, pack: Pack) -> None:
        self._case = case
        self._pack = pack
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add(self, name: str, rows: int | Ints, *shape: int) -> None:
        """A tensor [rows, *shape]; `rows` may be the row numbers to be made, of a tensor that is never whole."""
        numbers = np.arange(rows, dtype=np.int64) if isinstance(rows, int) else rows
        row_terms, column_terms = index_terms(self._case.seed, name, numbers, int(np.prod(shape, dtype=np.int64)))
        self._pack.add(f"{name}/rows", row_terms)
        self._pack.add(f"{name}/columns", column_terms)
        self._shapes[name] = (len(numbers), *shape)

    def values(self, small: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """float32, by name, in the shapes that were asked for; `small` is what the pack sent."""
        terms = self._terms(small)
        return self._apart(normals(hashed(terms)), terms)

    def hashes(self, small: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The int32 hashes that the values would be made from."""
        terms = self._terms(small)
        return self._apart(hashed(terms), terms)

    def _terms(self, small: Mapping[str, Tensor]) -> list[Terms]:
        return [(small[f"{name}/rows"], small[f"{name}/columns"]) for name in self._shapes]

    def _apart(self, flat: Tensor, terms: list[Terms]) -> dict[str, Tensor]:
        parts = split(flat, terms)
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """One rounding to nearest, which every device does alike; float8 saturates, where torch's cast gives NaN."""
    if dtype == torch.float8_e4m3fn:
        values = values.clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST)
    return values.to(dtype)


def store_(tensor: Tensor, values: Tensor) -> None:
    """`narrowed` into a tensor of any strides; a copy that rounds does so as a cast does, in one launch."""
    tensor.copy_(narrowed(values, tensor.dtype) if tensor.dtype == torch.float8_e4m3fn else values)


def add_scales(case: Case, pack: Pack) -> None:
    """The scales' numbers; one per tensor is sometimes [1] and sometimes 0-d."""
    flat = host_choice(case.seed, "scale shape", 2) == 1
    for name, numbers in scales(case).items():
        pack.add(f"scales/{name}", numbers if case.spec.scales == "head" or flat else numbers.reshape(()))


def scales_of(small: Mapping[str, Tensor]) -> Scales | None:
    """Scales of what `add_scales` sent; None if that was nothing."""
    found = {name: small.get(f"scales/{name}") for name in ("q", "k", "v", "out")}
    return None if all(scale is None for scale in found.values()) else Scales(**found)
