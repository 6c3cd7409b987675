"""Values that travel together inside of the Hopper prefill."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl


class Work(NamedTuple):
    """The rows of both consumers, as one tile of a request's tokens and a kv head's query heads, and their keys."""

    is_live: tl.tensor  # else there is nothing to do
    request: tl.tensor
    kv_head: tl.tensor
    first_row: tl.tensor  # of the request, in the batch
    first_token: tl.tensor  # of the request's, of which the tile has some row
    first_flat: tl.tensor  # the tile's first row, counted in (token, head) pairs from first_token's first
    end_token: tl.tensor
    context: tl.tensor  # keys before the request's first new one
    first_position: tl.tensor
    last_position: tl.tensor
    first_readable: tl.tensor  # the keys [first_readable, end_readable) that some row of the request sees
    end_readable: tl.tensor


class Tensors(NamedTuple):
    """Shared memory: queries of each consumer, rings of key and value tiles."""

    q: tl.tensor  # [CONSUMERS, rows, padded_head]
    k: tl.tensor  # [stages, keys, padded_head]
    v: tl.tensor  # [stages, keys, padded_value]


class Barriers(NamedTuple):
    """One per stage of a ring: full when a tile has come, empty when both consumers are done with it."""

    k_full: tl.tensor
    k_empty: tl.tensor
    v_full: tl.tensor  # one more at the end: where tiles arrive that have to be cleaned
    v_empty: tl.tensor


class Place(NamedTuple):
    """The next stage of a ring, and the parity of the round in which it is."""

    stage: tl.tensor
    phase: tl.tensor


class Carried(NamedTuple):
    """What goes from one tile of keys to the next: `weights` are those of the last tile, not yet multiplied."""

    weights: tl.tensor
    rescale: tl.tensor  # for what was summed before `weights`
    maximum: tl.tensor
    total: tl.tensor
    weighted: tl.tensor
