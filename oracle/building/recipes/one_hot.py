"""Values that are basis vectors, so that outputs show the weights themselves: folded, full, and with equal scores."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ...case import Case
from ..hashing import host_hashes, index_terms
from ..pages import Ints, Pages, first_readable
from ..poison import Slots
from .roles import Arrays, Values, roles, silence_, value_size


def plan(case: Case, pages: Pages, slots: Slots) -> Arrays:
    """Every key has an element, by hash; several share one."""
    rows, heads = index_terms(case.seed, "columns", slots.key_of_written, case.spec.num_kv_heads)
    x = (rows[:, None] + heads).view(np.uint32) * np.uint32(0x9E3779B1)
    columns = (x >> np.uint32(16)) % np.uint32(value_size(case.spec))
    return {"columns": _of_rows(case, columns.astype(np.int32))}


def plan_full(case: Case, pages: Pages, slots: Slots) -> Arrays:
    """The keys of a chunk have an element each, in order; the others have none.

    A page that several requests share is in the chunk of its first owner.
    """
    keys = slots.key_of_written
    starts = chunk_starts(case)[pages.request_of_key[keys]]
    columns = pages.index_of_key[keys][:, None] - starts  # outside of the chunk a number that no element has
    return {"columns": _of_rows(case, columns.astype(np.int32))}


def shape_(case: Case, values: Values, small: Values) -> None:
    v = values[roles(case.spec)[2]]
    v.copy_(torch.arange(v.shape[-1], device=v.device) == small["columns"][..., None])


def shape_census_(case: Case, values: Values, small: Values) -> None:
    """Without biases every weight is 1 before it is normalised, in any format: an output is a count over a total."""
    silence_(values)
    shape_(case, values, small)


def chunk_starts(case: Case) -> Ints:
    """[num_requests, num_kv_heads]: the first key of each chunk, among those that some row may see.

    By hash the chunk begins with the first such key, ends with the last, lies around the last row's window edge
    (where there is none: around the last cached key), or anywhere.
    """
    spec, size = case.spec, value_size(case.spec)
    shape = (case.batch.num_requests, spec.num_kv_heads)
    seq_lens = np.array(case.batch.seq_lens, dtype=np.int64)[:, None]
    query_lens = np.array(case.batch.query_lens, dtype=np.int64)[:, None]
    first = first_readable(case)[:, None]
    last = np.maximum(first, seq_lens - size)
    edge = (seq_lens - query_lens if spec.sliding_window is None else seq_lens - spec.sliding_window) - size // 2
    drawn = host_hashes(case.seed, "chunk", int(np.prod(shape))).reshape(shape)
    anywhere = first + (drawn >> np.uint32(8)).astype(np.int64) % (last - first + 1)
    choices = [np.broadcast_to(choice, shape) for choice in (first, last, np.clip(edge, first, last), anywhere)]
    return np.choose(drawn & np.uint32(3), choices)


def _of_rows(case: Case, columns: NDArray[np.int32]) -> NDArray[np.int32]:
    """[num_written, num_kv_heads], or [num_written] for MLA: which element of the value row is one, if any."""
    return columns[:, 0] if case.spec.is_mla else columns
