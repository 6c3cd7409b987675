"""Boundary events: where a request's lengths meet the edges of pages, tiles, splits and windows.

An event is a yes or no about one request of an attention operation, read from its lengths and the case's sizes alone.
`occurs` says which events hold for many requests at once; `of_case` for the requests of a case. Which events, and
which pairs of them within one request, can happen at all is enumerated in `event_pairs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..case import ATTENTION_OPERATIONS, Case
from .traits import TILES

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NONE = 0  # of a page, a window, a bias, a split, shared keys: there is none
UNLIMITED = -1  # of the right window, where 0 is a window
SMALLEST_MODULUS = 3  # below, first, last and other slots are not three different things


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Requests as arrays that broadcast: new tokens n, keys L, and the sizes around them (one number or one each)."""

    new_tokens: Ints
    seq_lens: Ints
    page: int
    split: int = NONE  # keys of a split, where the candidate says
    window: Ints | int = NONE
    right_window: Ints | int = UNLIMITED
    bias_width: Ints | int = NONE
    shared_keys: Ints | int = NONE  # leading keys on pages that several requests share


_MODULI = ("page", *(f"{tile}" for tile in TILES), "split")
_MEASURES = ("context", "seq_len", "window edge", "new tokens")  # the edge: the first key that the first token sees
_RESIDUES = ("0", "1", "-1")
_SINGLE = (
    "padding request",
    "idle request",
    "one new token",
    "no keys",
    "one key",
    "no context",
    "rows before the first key",
    "new tokens cross a page",
    "context = window - 1",
    "context = window",
    "context = window + 1",
    "seq_len = window - 1",
    "seq_len = window",
    "seq_len = window + 1",
    "window reaches the first key",
    "window ends within the new tokens",
    "right window ends before the last key",
    "right window ends at the last key",
    "bias narrower than the new tokens",
    "bias as wide as the new tokens",
    "bias wider than the new tokens",
    "shared pages",
    "shared pages only",
    "one split",
    "two splits",
    "many splits",
    "a split left of the window",
)
_GRID = tuple(f"{measure} % {modulus} = {r}" for measure in _MEASURES for modulus in _MODULI for r in _RESIDUES)
# New tokens are tiled; where they start and end in pages and splits is what the context and the length say.
_KEPT = np.array([not name.startswith(("new tokens % page", "new tokens % split")) for name in _GRID])

NAMES: tuple[str, ...] = (*(name for name, kept in zip(_GRID, _KEPT, strict=True) if kept), *_SINGLE)

# Of the whole case rather than a request; every campaign can draw them all.
CASE_NAMES = ("no requests", "requests without new tokens", "padding tokens", "unused table columns")


def occurs(requests: Requests) -> Bools:
    """[len(NAMES), number of requests]: which events hold for which requests."""
    n, length = np.broadcast_arrays(requests.new_tokens, requests.seq_lens)
    return np.concatenate([_residues(requests, n, length), _singles(requests, n, length)])


def _residues(requests: Requests, n: Ints, length: Ints) -> Bools:
    """Lengths at a multiple of pages, tiles and splits, one above and one below."""
    live = n > 0
    measures = np.stack([length - n, length, _window_edge(requests, n, length), n])[:, None, :]
    moduli = np.array([requests.page, *TILES, requests.split], dtype=np.int64)[None, :, None]
    usable = (measures > 0) & live & (moduli >= SMALLEST_MODULUS)
    rest = measures % np.maximum(moduli, 1)
    found = np.stack([rest == 0, rest == 1, rest == moduli - 1], axis=2) & usable[:, :, None, :]
    return np.asarray(found.reshape(len(_GRID), -1)[_KEPT])


def _window_edge(requests: Requests, n: Ints, length: Ints) -> Ints:
    """The first key that the first new token sees; not above 0 where it sees from the first key on."""
    window = np.asarray(requests.window)
    return np.where(window == NONE, 0, length - n - window + 1)


def _singles(requests: Requests, n: Ints, length: Ints) -> Bools:
    page, split = max(requests.page, 1), max(requests.split, 1)
    window, right = np.asarray(requests.window), np.asarray(requests.right_window)
    bias, shared = np.asarray(requests.bias_width), np.asarray(requests.shared_keys)
    context, edge, live = length - n, _window_edge(requests, n, length), n > 0
    seen = live & (length > 0)
    windowed, follows = seen & (window != NONE), live & (context > 0)
    ahead, biased = seen & (right != UNLIMITED) & (context >= 0), seen & (bias != NONE)
    sharing, divided = seen & (shared != NONE) & (length >= shared), seen & (requests.split != NONE)
    splits = -(-length // split)
    return np.stack(
        [
            ~live & (length == 0),
            ~live & (length > 0),
            n == 1,
            live & (length == 0),
            live & (length == 1),
            seen & (context == 0),
            seen & (context < 0),
            seen & (context >= 0) & (context // page != (length - 1) // page),
            *(windowed & follows & (context == window + delta) for delta in (-1, 0, 1)),
            *(windowed & (length == window + delta) for delta in (-1, 0, 1)),
            windowed & (edge <= 0),
            windowed & (window < n),
            ahead & (context + right + 1 < length),
            ahead & (context + right + 1 == length),
            biased & (bias < n),
            biased & (bias == n),
            biased & (bias > n),
            sharing,
            sharing & (length == shared),
            divided & (splits == 1),
            divided & (splits == 2),
            divided & (splits > 2),
            divided & (edge >= split),
        ]
    )


def of_case(case: Case, split: int = NONE) -> Bools | None:
    """`occurs` for the requests of a case, those that are alike once; None if it attends to nothing.

    split: keys of a split in the candidate's plan of this case.
    """
    spec, batch = case.spec, case.batch
    if spec.operation not in ATTENTION_OPERATIONS or not batch.query_lens:
        return None
    distinct = np.array(sorted(set(zip(batch.query_lens, batch.seq_lens, strict=True))), dtype=np.int64)
    shared = batch.shared_blocks * spec.block_size
    if sum(length >= shared for length in batch.seq_lens) < 2:
        shared = NONE
    return occurs(
        Requests(
            new_tokens=distinct[:, 0],
            seq_lens=distinct[:, 1],
            page=spec.block_size,
            split=split,
            window=spec.sliding_window or NONE,
            right_window=UNLIMITED if spec.right_window is None else spec.right_window,
            bias_width=spec.bias_width if spec.query_bias != "none" else NONE,
            shared_keys=shared,
        )
    )


def of_whole_case(case: Case) -> list[str]:
    """The names out of `CASE_NAMES` that hold; none for other operations than attention."""
    batch = case.batch
    if case.spec.operation not in ATTENTION_OPERATIONS:
        return []
    found = (
        not batch.query_lens,
        bool(batch.query_lens) and not any(batch.query_lens),
        batch.padding_tokens > 0,
        batch.table_slack > 0,
    )
    return [name for name, holds in zip(CASE_NAMES, found, strict=True) if holds]
