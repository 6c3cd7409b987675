"""Values that travel together inside of a kernel; kernels build these tuples themselves."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl


class Span(NamedTuple):
    """A request's scalars."""

    first_row: tl.tensor  # in the batch
    query_len: tl.tensor  # new tokens
    seq_len: tl.tensor  # keys


class Item(NamedTuple):
    """A piece of a request's work, out of one of the plan's lists."""

    request: tl.tensor
    index: tl.tensor  # which piece of the request: a tile of tokens, a split of its keys, or a token to merge
    span: Span
    num_splits: tl.tensor  # of the request; 1: its rows are finished where they are attended from, 0: it is prefilled
    first_partial: tl.tensor  # where the request's partial results begin, if it has more than one split
    split_keys: tl.tensor  # how long a split of the request is


class Rows(NamedTuple):
    """Rows of a tensor [num_tokens, num_query_heads, ...], one per entry."""

    tokens: tl.tensor  # of the batch
    heads: tl.tensor  # query heads
    mask: tl.tensor  # which of the entries exist


class QueryTile(NamedTuple):
    """A tile's rows: (token, query head of one kv head) pairs of one request, tokens outermost."""

    request: tl.tensor
    kv_head: tl.tensor
    rows: Rows
    tokens: tl.tensor  # within the request
    positions: tl.tensor
    context: tl.tensor  # keys before the request's first new one
    first_position: tl.tensor
    last_position: tl.tensor


class Query(NamedTuple):
    """A tile's rows of q."""

    main: tl.tensor  # [TILE.rows, padded_head]
    rope: tl.tensor  # [TILE.rows, padded_rope]; `main` again where there is none


class KeyTile(NamedTuple):
    """A tile's keys and where the cache has them; `readable` ones lie in the range and are hidden from nobody."""

    keys: tl.tensor  # numbered within the request
    block: tl.tensor  # int64
    slot: tl.tensor  # int64
    readable: tl.tensor


class State(NamedTuple):
    """The online softmax of a tile of rows, in base-2 logarithms; not yet divided."""

    maximum: tl.tensor
    total: tl.tensor
    weighted: tl.tensor  # [TILE.rows, padded_value]: weights times values
