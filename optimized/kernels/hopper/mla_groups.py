"""Values that travel together inside of the Hopper kernel of absorbed MLA."""

from __future__ import annotations

from typing import NamedTuple

import triton.experimental.gluon.language as gl
import triton.language as tl

from ..arguments import Numbers, Partials, Step
from ..groups import Item


class Barriers(NamedTuple):
    """Of one half of a tile: filled by the producer, emptied by the role that reads it last."""

    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class KeyTile(NamedTuple):
    """64 latent rows in shared memory, as boxes of 64 columns: columns 0..255, 256..511 and 512..575."""

    left: gl.shared_memory_descriptor
    right: gl.shared_memory_descriptor
    rope: gl.shared_memory_descriptor  # comes and goes with the half that the tile's own warp group sums
    on_left: Barriers
    on_right: Barriers


class QueryHalves(NamedTuple):
    """64 rows of q in shared memory, without the rotary part; emptied once by each warp group."""

    left: gl.shared_memory_descriptor
    right: gl.shared_memory_descriptor
    barriers: Barriers


class Handover(NamedTuple):
    """What one warp group leaves for the other: of each tile its weights and the running maximum, at last its sum."""

    weights: gl.shared_memory_descriptor
    maximum: gl.shared_memory_descriptor
    total: gl.shared_memory_descriptor
    maximum_ready: gl.shared_memory_descriptor
    weights_ready: gl.shared_memory_descriptor
    total_ready: gl.shared_memory_descriptor


class Shared(NamedTuple):
    """All of a program's shared memory."""

    q: QueryHalves
    even: KeyTile
    odd: KeyTile
    from_even: Handover
    from_odd: Handover


class Job(NamedTuple):
    """What is the same for all of a program's work."""

    step: Step
    partials: Partials
    numbers: Numbers


class Bounds(NamedTuple):
    """The part of a QueryTile that ranges of keys are made from."""

    first_position: tl.tensor
    last_position: tl.tensor


class Work(NamedTuple):
    """64 rows of a request and a range of its keys; all scalars."""

    item: Item
    first_pair: tl.tensor  # the first of the rows, in (token, head) pairs of the request
    end_token: tl.tensor  # of the request: rows from here on are none of this work
    first_key: tl.tensor  # where the tiles begin: `start`, or before it on the same page
    start: tl.tensor
    end: tl.tensor
    inner_start: tl.tensor  # keys that all rows see
    inner_end: tl.tensor
    num_steps: tl.tensor  # of two tiles of keys
    table: tl.tensor  # the request's row of the block table


class Running(NamedTuple):
    """A warp group's registers between two steps."""

    scores: tl.tensor  # of the step to come; its products may still be under way
    weighted: tl.tensor  # [64, 256]
    maximum: tl.tensor
    total: tl.tensor  # of the weights of its own tiles
