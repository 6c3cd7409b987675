"""A few keys at edges get nearly all of the weight."""

from __future__ import annotations

import numpy as np

from ...case import Case
from ..pages import Ints, Pages
from ..poison import Slots
from .roles import TILES, Arrays, Values, by_kv_head, hashed_keys, of_rows, roles, signs, strengths

_LOGIT = 14.0  # exp(14) outweighs a million ordinary keys


def plan(case: Case, pages: Pages, slots: Slots) -> Arrays:
    direction = signs(case)
    return {
        "signs": direction,
        "pull": direction * strengths(case, _LOGIT)[:, None],
        "needles": needles(case, pages, slots),
    }


def shape_(case: Case, values: Values, small: Values) -> None:
    """Turn all queries into their head's direction, and the needles among the keys, strongly enough to win."""
    q, k, v = (values[name] for name in roles(case.spec))
    by_kv_head(case, q).add_(small["signs"][:, None])
    rows = small["needles"]
    k.index_copy_(0, rows, k[rows] * 0.25 + of_rows(small["pull"], k))
    v.index_copy_(0, rows, v[rows] * 4.0)


def needles(case: Case, pages: Pages, slots: Slots) -> Ints:
    """Places among the written rows: keys at the window's edges, both ends, page, tile and split boundaries.

    The window's edges are those of a request's first, middle and last row. Of the keys that are nobody's to
    read none is here: they are poisoned.
    """
    query_lens = np.array(case.batch.query_lens, dtype=np.int64)
    seq_lens = np.array(case.batch.seq_lens, dtype=np.int64)
    last, context = seq_lens - 1, seq_lens - query_lens
    chosen = [np.zeros_like(last), last, hashed_keys(case, "needle", seq_lens)]
    for position in (context, (context + last) // 2, last):
        chosen.append(position)
        if case.spec.sliding_window is not None:
            chosen += [position - case.spec.sliding_window + 1, position - case.spec.sliding_window]
        if case.spec.right_window is not None:
            chosen += [position + case.spec.right_window, position + case.spec.right_window + 1]
    boundary = hashed_keys(case, "boundary", seq_lens)
    for size in (case.spec.block_size, *TILES):
        for key in (boundary, last):
            chosen += [key // size * size, key // size * size - 1]
    keys = np.stack(chosen)
    real = (keys >= 0) & (keys < seq_lens) & (query_lens > 0)
    logical = np.unique((keys + pages.key_starts[:-1])[real])
    written = slots.written_of_key[logical]
    return np.unique(written[written >= 0])
