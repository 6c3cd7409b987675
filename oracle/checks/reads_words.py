"""The places of a call's tensors in words: slots by page and key, rows by request and token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..building.pages import Pages, lay_out
from ..building.problem import Problem
from ..locate import locate
from .reads_memory import Region


@dataclass(frozen=True)
class Words:
    """Says where things are in one problem."""

    problem: Problem

    @cached_property
    def _pages(self) -> Pages:
        """Of the case: the table that the candidate got holds garbage where nobody may look."""
        return lay_out(self.problem.case)

    def slot(self, slot: int) -> str:
        """A slot of an attention case's pool, and whose key lies there."""
        block, offset = divmod(slot, self.problem.case.spec.block_size)
        return f"slot {offset} of page {block} ({self._owner(block, offset, slot)})"

    def _owner(self, block: int, offset: int, slot: int) -> str:
        pages = self._pages
        keys = np.flatnonzero(pages.slot_of_key == slot)
        if len(keys):
            owners = [f"key {pages.index_of_key[key]} of request {pages.request_of_key[key]}" for key in keys[:3]]
            return ", ".join(owners)
        used = np.arange(pages.block_table.shape[1]) < pages.used_blocks[:, None]
        owning = np.flatnonzero(((pages.block_table == block) & used).any(axis=1))
        if len(owning):
            request = int(owning[0])
            return f"past the {self.problem.case.batch.seq_lens[request]} keys of request {request}"
        return "a page that no request has"

    def row(self, token: int, head: int) -> str:
        """A row of q, out and lse."""
        return locate(self.problem, "out", (token, head))

    def element(self, name: str, index: tuple[int, ...]) -> str:
        """An element of any of the call's tensors."""
        at = f"element [{', '.join(str(part) for part in index)}]"
        if name in ("q", "q_nope", "q_pe", "out", "lse"):
            return f"{at}, {locate(self.problem, 'out', index)}"
        if not name.endswith("_cache"):
            return at
        if name in self.problem.outputs:
            return f"{at}, {locate(self.problem, name, index)}"
        return self.slot(index[0] * self.problem.case.spec.block_size + index[1])


def more(count: int, things: str) -> str:
    """What follows the one that was described."""
    return f" ({count} such {things})" if count > 1 else ""


def next_to(address: int, named: Mapping[str, Region]) -> str:
    """The tensor that an address in no element is nearest to, and how far it is."""

    def distance(region: Region) -> int:
        first, end = region.span
        return max(first - address, address - end + 1, 0)

    nearest = min((region for region in named.values() if region.tensor.numel()), key=distance)
    first, end = nearest.span
    if address < first:
        return f"{first - address} bytes before {nearest.name}"
    return f"{address - end} bytes after the end of {nearest.name}" if address >= end else f"a gap of {nearest.name}"
