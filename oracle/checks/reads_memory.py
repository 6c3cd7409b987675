"""From addresses to elements: which tensor of the call lies there, and which of its elements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from ..building.guards import extent
from ..execution.tracing import Bools, Ints, Trace


@dataclass(frozen=True)
class Region:
    """One tensor of the call and where it lies."""

    name: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @cached_property
    def span(self) -> tuple[int, int]:
        """Addresses of its first byte and of the one after its last."""
        start = self.tensor.data_ptr()
        return start, start + extent(self.shape, self.tensor.stride()) * self.tensor.element_size()

    def elements(self, addresses: Ints) -> Ints:
        """Which element, counted row by row, each address lies in; -1 where it lies in none of them.

        Strides may be any under which elements do not overlap: from the widest on, each divides what is left.
        """
        rest = (addresses - self.span[0]) // self.tensor.element_size()
        inside = (rest >= 0) & (self.tensor.numel() > 0)
        element = np.zeros_like(rest)
        strides = self.tensor.stride()
        for dim in sorted(range(len(strides)), key=lambda dim: -strides[dim]):
            if self.shape[dim] > 1 and strides[dim] > 0:
                index, rest = np.divmod(rest, strides[dim])
                inside &= index < self.shape[dim]
                element += index * prod(self.shape[dim + 1 :])
        return np.where(inside & (rest == 0), element, -1)


@dataclass(frozen=True)
class Touches:
    """Loads from, or stores to, one tensor; one entry per lane and element."""

    accesses: Ints  # of the trace
    elements: Ints  # counted row by row


@dataclass(frozen=True)
class Memory:
    """What a trace means for the tensors of a call."""

    regions: dict[str, Region]
    loads: dict[str, Touches]
    stores: dict[str, Touches]
    loads_beside: Ints  # addresses in the same memory, but in no element of a tensor
    stores_beside: Ints


def regions(arguments: Mapping[str, Any]) -> dict[str, Region]:
    """The tensors among a call's arguments, those of its dataclasses as `batch.seq_lens`."""
    return {name: Region(name, tensor) for name, tensor in _named(arguments)}


def _named(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif is_dataclass(value):
            inner = {f"{name}.{field.name}": getattr(value, field.name) for field in fields(value)}
            yield from _named(inner)


def resolve(trace: Trace, named: Mapping[str, Region]) -> Memory:
    """Every lane of the trace as an element of a tensor; what lies in other memory is a candidate's own scratch."""
    access = trace.access_of_lane
    width = trace.widths[access]
    found = np.zeros(len(access), dtype=bool)
    loads, stores = {}, {}
    for region in named.values():
        first, end = region.span
        near = np.flatnonzero((trace.addresses < end) & (trace.addresses + width > first))
        touched = [_touches(region, trace, near[width[near] == wide], int(wide)) for wide in np.unique(width[near])]
        for lanes, _ in touched:
            found[lanes] = True
        lanes = np.concatenate([np.zeros(0, dtype=np.int64), *(lanes for lanes, _ in touched)])
        elements = np.concatenate([np.zeros(0, dtype=np.int64), *(elements for _, elements in touched)])
        written = trace.is_store[access[lanes]]
        loads[region.name] = Touches(access[lanes[~written]], elements[~written])
        # An element that is written in parts was written once: by the part that begins it.
        written &= (trace.addresses[lanes] - first) % region.tensor.element_size() == 0
        stores[region.name] = Touches(access[lanes[written]], elements[written])
    beside = ~found & _in_storages(trace.addresses, named)
    written = trace.is_store[access]
    return Memory(dict(named), loads, stores, trace.addresses[beside & ~written], trace.addresses[beside & written])


def _touches(region: Region, trace: Trace, lanes: Ints, width: int) -> tuple[Ints, Ints]:
    """(lane, element) pairs of lanes of one width: a wide one holds several elements, a narrow one a part of one."""
    itemsize = region.tensor.element_size()
    addresses = trace.addresses[lanes]
    steps = max(1, width // itemsize)
    elements = region.elements(addresses[:, None] + itemsize * np.arange(steps))
    offsets = (addresses - region.span[0]) % itemsize
    whole = (elements >= 0).all(axis=1) & ((offsets == 0) | (width < itemsize))
    return np.repeat(lanes[whole], steps), elements[whole].reshape(-1)


def _in_storages(addresses: Ints, named: Mapping[str, Region]) -> Bools:
    inside = np.zeros(len(addresses), dtype=bool)
    storages = (region.tensor.untyped_storage() for region in named.values())
    for start, size in {(storage.data_ptr(), storage.nbytes()) for storage in storages}:
        inside |= (addresses >= start) & (addresses < start + size)
    return inside
