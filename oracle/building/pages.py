"""Where a case's keys lie: which page holds which part of which request, and which of them may be read.

Everything here happens on the host and in numpy: it depends on the case alone, and a device learns of it in
one transfer. Keys are numbered through all requests, request after request ("logical" keys).

What may be read is worked out here from the contract's text, not taken from the reference: two readings that
disagree show up as a failing case.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..case import Case
from .hashing import host_choice, host_hashes

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

HUGE_PAGE = 2147480000


@dataclass(frozen=True)
class Pages:
    """The pool and the table. A slot may hold keys of several requests, where they share a prefix."""

    num_blocks: int
    block_table: NDArray[np.int32]  # [num_requests, max_blocks], unused entries not yet poisoned: 0
    used_blocks: Ints  # [num_requests]: leading table entries that hold keys
    key_starts: Ints  # [num_requests + 1]: a request's logical keys are key_starts[r] .. key_starts[r + 1] - 1
    request_of_key: Ints  # [num_keys]
    index_of_key: Ints  # [num_keys]: j, within its request
    slot_of_key: Ints  # [num_keys]: block * block_size + offset


def lay_out(case: Case) -> Pages:
    """Pages by a seeded permutation over a pool an eighth larger than needed; page 0 belongs to nobody.

    Without spare blocks the pool has the pages that are needed, page 0 among them: at times it is the only one.
    """
    block_size = case.spec.block_size
    seq_lens = np.array(case.batch.seq_lens, dtype=np.int64)
    used = -(-seq_lens // block_size)
    needed = int(used.sum())
    spare = case.batch.spare_blocks
    num_blocks = pool_size(case)
    width = int(used.max(initial=0)) + case.batch.table_slack
    table = np.zeros((len(seq_lens), width), dtype=np.int32)
    order = np.argsort(host_hashes(case.seed, "pages", num_blocks - spare), kind="stable") + spare
    table[np.arange(width) < used[:, None]] = order[:needed]
    _share(table, case)
    if case.batch.repeated_blocks:
        _repeat(table, case, used)

    starts = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(seq_lens)))
    requests = np.repeat(np.arange(len(seq_lens)), seq_lens)
    indices = np.arange(int(starts[-1])) - starts[requests]
    blocks = table[requests, indices // block_size].astype(np.int64)
    slots = blocks * block_size + indices % block_size
    return Pages(num_blocks, table, used, starts, requests, indices, slots)


def pool_size(case: Case) -> int:
    """The pages of the case's pool."""
    needed = sum(-(-length // case.spec.block_size) for length in case.batch.seq_lens)
    usual = 1 + needed + max(2, needed // 8) if case.batch.spare_blocks else max(1, needed)
    return max(usual, case.batch.pool_blocks)


def _share(table: NDArray[np.int32], case: Case) -> None:
    """Requests that are long enough have their leading pages in common; sometimes one page stands there twice."""
    shared = case.batch.shared_blocks
    long_enough = [r for r, length in enumerate(case.batch.seq_lens) if length >= shared * case.spec.block_size]
    if shared == 0 or not long_enough:
        return
    table[long_enough, :shared] = table[long_enough[0], :shared]
    if shared >= 2 and host_choice(case.seed, "repeated page", 4) == 0:
        table[long_enough, 1] = table[long_enough[0], 0]


def _repeat(table: NDArray[np.int32], case: Case, used: Ints) -> None:
    """Wherever a request has two pages or more, a later column names the page of an earlier one."""
    rows = np.flatnonzero(used >= 2)
    drawn = host_hashes(case.seed, "repeated pages", len(used))[rows].astype(np.int64)
    later = 1 + (drawn & 0xFFFF) % (used[rows] - 1)
    table[rows, later] = table[rows, (drawn >> 16) % later]


def first_readable(case: Case) -> Ints:
    """[num_requests]: no key left of this one is seen by any row; the sequence length where there are no rows.

    The leftmost key that any row sees is the first row's p - W + 1, and the windows of the rows after it leave
    no gap up to the last key, which the last row sees.
    """
    query_lens = np.array(case.batch.query_lens, dtype=np.int64)
    seq_lens = np.array(case.batch.seq_lens, dtype=np.int64)
    first = np.zeros_like(seq_lens)
    if case.spec.sliding_window is not None:
        first = np.maximum(0, seq_lens - query_lens - case.spec.sliding_window + 1)
    return np.where(query_lens > 0, np.minimum(first, seq_lens), seq_lens)


def readable_keys(case: Case, pages: Pages, hidden: Bools | None) -> Bools:
    """[num_keys]: whether some row of the key's own request may see it.

    hidden [num_live_tokens]: the query bias hides the token's own key from every row of its request.
    """
    readable = pages.index_of_key >= first_readable(case)[pages.request_of_key]
    if hidden is None:
        return readable
    query_lens = np.array(case.batch.query_lens, dtype=np.int64)
    requests = np.repeat(np.arange(len(query_lens)), query_lens)
    # A token's key is the last keys' counterpart of the last tokens; tokens before key 0 have none.
    distance_to_end = np.cumsum(query_lens)[requests] - np.arange(len(requests))
    keys = pages.key_starts[requests + 1] - distance_to_end
    readable[keys[hidden & (keys >= pages.key_starts[requests])]] = False
    return readable


def poison_table(case: Case, pages: Pages, readable: Bools) -> NDArray[np.int32]:
    """The table with garbage in every entry through which no key may be read: huge, negative, or another's page."""
    unused = np.ones(pages.block_table.shape, dtype=bool)
    columns = pages.index_of_key // case.spec.block_size
    unused[pages.request_of_key[readable], columns[readable]] = False
    drawn = host_hashes(case.seed, "unused entries", pages.block_table.size).reshape(pages.block_table.shape)
    others = (drawn >> np.uint32(8)) % np.uint32(pages.num_blocks)
    kinds = [np.full(drawn.shape, HUGE_PAGE), np.full(drawn.shape, -1), -1 - others.astype(np.int64), others]
    garbage = np.choose(drawn & np.uint32(3), kinds)
    return np.where(unused, garbage, pages.block_table).astype(np.int32)
