"""Which rows a program takes when, and which keys they see: the same for the copying warp and those that attend."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ..tiles import key_range
from ..work_lists import NUM_PREFILL_ITEMS, load_item
from .prefill_groups import Place, Work
from .sizes import CONSUMERS as NUM_CONSUMERS

CONSUMERS = gl.constexpr(NUM_CONSUMERS)


@gluon.constexpr_function
def joined_items(SIZES, TILE):
    """Items of the prefill list that one tile of rows takes together, where a single one has fewer rows."""
    return max(CONSUMERS.value * TILE.rows // (SIZES.tile_tokens * SIZES.group), 1)


@gluon.constexpr_function
def tiles_of_item(SIZES, TILE):
    """Tiles of rows that make an item of the prefill list, or those that are joined."""
    rows = SIZES.tile_tokens * SIZES.group * joined_items(SIZES, TILE)
    return -(-rows // (CONSUMERS.value * TILE.rows))


@gluon.jit
def num_works(work, SIZES: gl.constexpr, TILE: gl.constexpr):
    return gl.load(work.counts + NUM_PREFILL_ITEMS) * (SIZES.num_kv_heads * tiles_of_item(SIZES, TILE))


@gluon.jit
def place_in_order(turn, works, TILE: gl.constexpr):
    """What this program does in its `turn`-th turn; `works` or more: nothing.

    The last tiles of a causal request see most keys. "backwards" begins with them. "snake" does so too, and turns
    round after each turn: else the program that comes first in one turn has the longest tile in all of them.
    """
    lane = gl.program_id(0)
    if TILE.order == "snake":
        lane = gl.where(turn % 2 == 0, lane, gl.num_programs(0) - 1 - lane)
    place = turn * gl.num_programs(0) + lane
    if TILE.order != "forwards":
        place = gl.where(place < works, works - 1 - place, place)
    return place


@gluon.jit
def work_of(step, numbers, turn, works, SIZES: gl.constexpr, TILE: gl.constexpr):
    """A program's work in its `turn`-th turn, and the keys [start, end) that some of its rows sees.

    Of a work that is not live anything may be said: even the first record is garbage where the list is empty.
    """
    JOINED: gl.constexpr = joined_items(SIZES, TILE)
    TILES: gl.constexpr = tiles_of_item(SIZES, TILE)
    ROWS: gl.constexpr = CONSUMERS * TILE.rows
    place = place_in_order(turn, works, TILE)
    exists = place < works
    place = gl.where(exists, place, 0)
    item = load_item(step.work.prefill_items, place // (SIZES.num_kv_heads * TILES))
    index = item.index
    span = item.span
    context = span.seq_len - span.query_len
    first_flat = place % TILES * ROWS
    first_token = index * SIZES.tile_tokens
    end_token = gl.minimum(first_token + JOINED * SIZES.tile_tokens, span.query_len)
    last_token = gl.minimum(first_token + (first_flat + ROWS - 1) // SIZES.group, end_token - 1)
    first_readable = 0
    if numbers.sliding_window is not None:
        first_readable = gl.maximum(context - numbers.sliding_window + 1, 0)
    work = Work(
        is_live=exists & (index % JOINED == 0) & (first_token + first_flat // SIZES.group < end_token),
        request=item.request,
        kv_head=place // TILES % SIZES.num_kv_heads,
        first_row=span.first_row,
        first_token=first_token,
        first_flat=first_flat,
        end_token=end_token,
        context=context,
        first_position=context + first_token + first_flat // SIZES.group,
        last_position=context + last_token,
        first_readable=first_readable,
        end_readable=span.seq_len,
    )
    start, end = key_range(work, span, numbers, SIZES.causal)
    return work, start, end


@gluon.jit
def no_work():
    """What `work_of` would say of the turn before the first."""
    zero = gl.to_tensor(0)
    return Work(zero != 0, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero), zero, zero


@gluon.jit
def key_tiles(start, end, KEYS: gl.constexpr):
    """The tiles [first, last) of keys; rows without keys still have one, of zeros: they must be written."""
    first = start // KEYS
    return first, gl.maximum((end + KEYS - 1) // KEYS, first + 1)


@gluon.jit
def advance(place, STAGES: gl.constexpr):
    """The stage after this one."""
    wraps = place.stage == STAGES - 1
    return Place(stage=gl.where(wraps, 0, place.stage + 1), phase=gl.where(wraps, place.phase ^ 1, place.phase))
