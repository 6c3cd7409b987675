"""What a check knows of a case on the host: which rows there are, what each may see, and where the keys lie.

The ranges are worked out from the contract's text once more, and not taken from the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..building.pages import HUGE_PAGE, Bools, Ints, Pages, lay_out, readable_keys
from ..building.poison import Slots, classify
from ..building.query_bias import plan_bias
from ..case import Case


@dataclass(frozen=True)
class LiveRows:
    """The rows of the requests, in the order of the buffers; all [number of new tokens]."""

    requests: Ints
    index: Ints  # t, within the request
    positions: Ints  # p = L - n + t
    first: Ints  # causality and windows show keys first .. end - 1
    end: Ints  # not below `first`


@dataclass(frozen=True)
class Layout:
    """The case's rows, pages and slots."""

    rows: LiveRows
    pages: Pages
    readable: Bools  # [num_keys]: some row of the key's own request may see it
    slots: Slots

    def unreadable_slots(self, block_size: int) -> Bools:
        """[num_blocks, block_size]: no row of any request may see the key in this slot."""
        unreadable = np.ones(self.pages.num_blocks * block_size, dtype=bool)
        unreadable[self.slots.written] = False
        return unreadable.reshape(-1, block_size)

    def written_places(self, block_size: int) -> tuple[Ints, Ints]:
        """(blocks, offsets) of the slots that some row may see."""
        blocks, offsets = np.divmod(self.slots.written, block_size)
        return blocks, offsets


def layout_of(case: Case) -> Layout:
    pages, bias = lay_out(case), plan_bias(case)
    readable = readable_keys(case, pages, bias.hidden if bias else None)
    return Layout(live_rows(case), pages, readable, classify(case, pages, readable))


def live_rows(case: Case) -> LiveRows:
    """Every row of every request and the keys that causality and windows let it see."""
    spec = case.spec
    query_lens = np.array(case.batch.query_lens, dtype=np.int64)
    seq_lens = np.array(case.batch.seq_lens, dtype=np.int64)
    requests = np.repeat(np.arange(len(query_lens)), query_lens)
    index = np.arange(len(requests)) - (np.cumsum(query_lens) - query_lens)[requests]
    positions = (seq_lens - query_lens)[requests] + index
    first, end = np.zeros_like(positions), seq_lens[requests]
    if spec.sliding_window is not None:
        first = np.maximum(first, positions - spec.sliding_window + 1)
    if spec.causal:
        end = np.minimum(end, positions + 1)
    if spec.right_window is not None:
        end = np.minimum(end, positions + spec.right_window + 1)
    return LiveRows(requests, index, positions, first, np.maximum(first, end))


@dataclass(frozen=True)
class Packing:
    """Lists of keys put into pages of their own, one list after the other."""

    slots: Ints  # [num_blocks, block_size]: the old slot whose content goes here; slot 0, nobody's, where none does
    table: Ints  # [number of lists, columns]


def packed(key_slots: Sequence[Ints], block_size: int, columns: int) -> Packing:
    """Pages for lists of old slots; page 0 stays nobody's, and unused table entries are huge."""
    used = [-(-len(slots) // block_size) for slots in key_slots]
    first_pages = 1 + np.cumsum([0, *used])
    flat = np.zeros(int(first_pages[-1] + 1) * block_size, dtype=np.int64)
    table = np.full((len(key_slots), columns), HUGE_PAGE, dtype=np.int64)
    for number, slots in enumerate(key_slots):
        start = int(first_pages[number])
        flat[start * block_size : start * block_size + len(slots)] = slots
        table[number, : used[number]] = start + np.arange(used[number])
    return Packing(flat.reshape(-1, block_size), table)
