"""Which of two captures takes a batch: the full one what is uniform, the piecewise one the rest.

Engines capture a bucket twice where their attention can only be captured for uniform batches (vLLM's
`full_and_piecewise`): decode, and verification of as many drafted tokens for every request. At each step they choose
by what the host knows of the batch, which is its query lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

FULL, PIECEWISE = "full", "piecewise"


def dispatch(query_lens: Sequence[int], captured_query_len: int) -> str:
    """FULL or PIECEWISE for a batch, where the full graph was captured for requests of `captured_query_len` tokens."""
    return FULL if 0 < uniform_query_len(query_lens) <= captured_query_len else PIECEWISE


def uniform_query_len(query_lens: Sequence[int]) -> int:
    """The tokens that every request has, padding behind the last one aside; 0: they differ, or there is none.

    A request without tokens that stands before one with tokens is not padding: no row i is that of request
    i // query length then.
    """
    lens = set(without_padding(query_lens))
    return lens.pop() if len(lens) == 1 else 0


def without_padding(query_lens: Sequence[int]) -> tuple[int, ...]:
    """The query lengths up to the last request that has tokens."""
    count = max((index + 1 for index, tokens in enumerate(query_lens) if tokens), default=0)
    return tuple(query_lens[:count])
