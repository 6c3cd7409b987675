"""A ragged batch cut into a few padded chunks: which requests, which of their rows, which range of their keys.

The reference has no loop over tokens or heads. It loops over chunks, each a padded rectangle of requests of
similar size, small enough that its float64 scores [requests, heads, rows, keys] stay within a budget. The
lengths are read on the host for this, once per call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .problem import Batch, Rules
from .visibility import key_range

# float64 elements that one chunk's scores and gathered keys may take. Some ten tensors of that size live at once.
BUDGET = {"cpu": 2**21, "cuda": 2**25}
# Below this many elements the padding costs less than another chunk's dispatch would.
TRIVIAL = {"cpu": 2**15, "cuda": 2**22}


@dataclass(frozen=True)
class Request:
    """One request's lengths on the host."""

    index: int
    first_token: int  # its first row in q and out
    query_len: int
    seq_len: int
    rules: Rules  # those of the operation, but for windows: problems that are put together may differ in them

    def keys_of(self, first_row: int, num_rows: int) -> tuple[int, int]:
        """The range of keys that these rows, cut to the request's own, may see."""
        start = self.seq_len - self.query_len
        last_row = min(first_row + num_rows, self.query_len) - 1
        return key_range(start + first_row, start + last_row, self.seq_len, self.rules)

    def span(self, num_rows: int) -> int:
        """The most keys that any `num_rows` consecutive rows may see, and 1 where there is none."""
        start, stop = self.keys_of(0, self.query_len)
        span = stop - start
        right = 0 if self.rules.causal else self.rules.right_window
        if self.rules.sliding_window is not None and right is not None:
            span = min(span, num_rows - 1 + self.rules.sliding_window + right)
        return max(1, span)


@dataclass(frozen=True)
class ChunkPlan:
    """Rows first_row.. of some requests, each with `num_keys` keys from its own first key on."""

    requests: tuple[Request, ...]
    first_keys: tuple[int, ...]
    first_row: int
    num_rows: int
    num_keys: int  # at least 1, so that no tensor is empty


@dataclass(frozen=True)
class Costs:
    """What a chunk of one request costs in elements: num_query_heads per (row, key), key_width per key."""

    num_query_heads: int
    key_width: int
    budget: int
    trivial: int

    def padded(self, num_requests: int, num_rows: int, num_keys: int) -> int:
        return num_requests * num_keys * (self.num_query_heads * num_rows + self.key_width)


def costs(num_query_heads: int, key_width: int, device: torch.device) -> Costs:
    kind = device.type if device.type in BUDGET else "cpu"
    return Costs(num_query_heads, key_width, BUDGET[kind], TRIVIAL[kind])


def plan_chunks(requests: Sequence[Request], cost: Costs) -> Iterator[ChunkPlan]:
    """Chunks that hold every row of every request exactly once."""
    for group in _groups(requests, cost):
        longest = max(request.query_len for request in group)
        num_rows = longest
        while num_rows > 1 and _group_cost(group, num_rows, cost) > cost.budget:
            num_rows = (num_rows + 1) // 2
        for first_row in range(0, longest, num_rows):
            yield _chunk(group, first_row, min(num_rows, longest - first_row))


def read_requests(batch: Batch, rules: Rules) -> list[Request]:
    """The requests of a batch, whose lengths lie on the device; it is waited for."""
    lengths = torch.cat((batch.cu_seqlens_q, batch.seq_lens)).tolist()  # one transfer
    starts, seq_lens = lengths[: batch.num_requests + 1], lengths[batch.num_requests + 1 :]
    requests = zip(pairwise(starts), seq_lens, strict=True)
    return [
        Request(index, start, stop - start, seq_len, rules) for index, ((start, stop), seq_len) in enumerate(requests)
    ]


def _groups(requests: Sequence[Request], cost: Costs) -> Iterator[list[Request]]:
    """Neighbours in size, as long as padding them to one rectangle at most doubles the work."""
    live = [request for request in requests if request.query_len > 0]
    spans = {request.index: request.span(request.query_len) for request in live}
    group: list[Request] = []
    rows = keys = exact = 0
    for request in sorted(live, key=lambda item: (item.query_len, spans[item.index])):
        span = spans[request.index]
        wider_rows, wider_keys = max(rows, request.query_len), max(keys, span)
        wider_exact = exact + cost.padded(1, request.query_len, span)
        padded = cost.padded(len(group) + 1, wider_rows, wider_keys)
        if group and padded > min(cost.budget, max(cost.trivial, 2 * wider_exact)):
            yield group
            group, wider_rows, wider_keys = [], request.query_len, span
            wider_exact = cost.padded(1, request.query_len, span)
        group.append(request)
        rows, keys, exact = wider_rows, wider_keys, wider_exact
    if group:
        yield group


def _group_cost(group: Sequence[Request], num_rows: int, cost: Costs) -> int:
    return cost.padded(len(group), num_rows, max(request.span(num_rows) for request in group))


def _chunk(group: Sequence[Request], first_row: int, num_rows: int) -> ChunkPlan:
    members = [request for request in group if request.query_len > first_row]
    ranges = [request.keys_of(first_row, num_rows) for request in members]
    return ChunkPlan(
        requests=tuple(members),
        first_keys=tuple(start for start, _ in ranges),
        first_row=first_row,
        num_rows=num_rows,
        num_keys=max(1, *(stop - start for start, stop in ranges), 1),
    )
