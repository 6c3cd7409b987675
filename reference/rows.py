"""The rows of a batch in padded chunks: where each stands, which keys it sees, and their values in float64.

Nothing that no row may see is read as data. A slot's page is looked up only where some row of the chunk sees
the key, and what the cache holds elsewhere, NaN as well, is replaced by 0 before any arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .chunks import ChunkPlan, Costs, Request, costs, plan_chunks, read_requests
from .problem import FLOAT8, Batch, Rules, Scales
from .visibility import Limits, visible_keys

NO_SCALES = Scales()


@dataclass(frozen=True)
class Places:
    """G requests x T rows x L keys, the indices only. Padding inside the chunk is marked by `valid`."""

    requests: Tensor  # [G] int64
    tokens: Tensor  # [G, T] int64 row of q and out; num_tokens where not valid, one past the last
    valid: Tensor  # [G, T] bool: a row of the request, not the chunk's padding
    positions: Tensor  # [G, T] int64: p = L - n + t, negative where seq_len < query_len
    keys: Tensor  # [G, L] int64: j
    visible: Tensor  # [G, T, L] bool: by causality, windows and query bias; False in every row that is not valid
    query_bias: Tensor | None  # [G, T, L] float64, 0 where there is no entry or the key is not visible

    @cached_property
    def hidden(self) -> Tensor:
        """[G, T, L] bool: where no key is visible."""
        return ~self.visible

    @property
    def readable(self) -> Tensor:
        """[G, L] bool: some row here sees the key, so its slot may be read."""
        return self.visible.any(dim=1)

    @property
    def distances(self) -> Tensor:
        """[G, T, L] float64: j - p."""
        return (self.keys[:, None, :] - self.positions[:, :, None]).double()


@dataclass(frozen=True)
class Rows(Places):
    """The same with the values, scales multiplied in (exactly: a float8 times a float32 fits a float64).

    And with rules that the requests of several problems, put together, differ in.
    """

    softcap: float | Tensor | None  # or [G, 1, 1, 1, 1] float64
    alibi_slopes: Tensor | None  # [num_query_heads], or [G, num_query_heads] where requests differ in them
    sinks: Tensor | None  # likewise
    q: Tensor  # [G, T, num_kv_heads, group_size, D] float64; 0 in rows that see nothing
    k: Tensor  # [G, L, num_kv_heads, D] float64; 0 in slots that are not readable
    v: Tensor  # [G, L, num_kv_heads, Dv] float64; 0 in slots that are not readable
    # In memory each lies head by head, as their matrix products read them.


@dataclass(frozen=True)
class Slots:
    """Where a chunk's keys lie in a cache, [G, L] each."""

    hidden: Tensor  # bool: no row here sees the key; its slot, given as one of block 0, must not be read as data
    blocks: Tensor  # int32
    offsets: Tensor  # int64: inside of the block


def row_groups(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    rules: Rules,
    scales: Scales | None = None,
    *,
    key_width: int | None = None,
    requests: Sequence[Request] | None = None,
) -> Iterator[Rows]:
    """Every row of every request once; shapes as `attention` takes them, in any float dtype, already checked.

    key_width: float64 elements that one key will take, where that is more than what is gathered here;
    requests: the batch's, where the host knows them.
    """
    scales = scales or NO_SCALES
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    key_width = key_width or num_kv_heads * (k_cache.shape[3] + v_cache.shape[3])
    cost = costs(q.shape[1], key_width, q.device)
    for places in place_groups(batch, rules, q.shape[0], cost, requests):
        slots = _slots(places, batch, num_blocks, block_size)
        yield Rows(
            **vars(places),
            softcap=rules.softcap,
            alibi_slopes=rules.alibi_slopes,
            sinks=rules.sinks,
            q=_gather_queries(q, places, num_kv_heads, scales.q),
            k=_gather_keys(k_cache, places, slots, scales.k),
            v=_gather_keys(v_cache, places, slots, scales.v),
        )


def place_groups(
    batch: Batch, rules: Rules, num_tokens: int, cost: Costs, requests: Sequence[Request] | None = None
) -> Iterator[Places]:
    """The indices of every row once, without a look at q or a cache."""
    for plan in plan_chunks(read_requests(batch, rules) if requests is None else requests, cost):
        yield _place(plan, batch, rules, num_tokens)


def per_head(scale: Tensor | None) -> Tensor | None:
    """A scale as float64 [num_kv_heads] or [1]."""
    return None if scale is None else scale.double().reshape(-1)


def _place(plan: ChunkPlan, batch: Batch, rules: Rules, num_tokens: int) -> Places:
    columns = [*zip(*(_numbers(request) for request in plan.requests), strict=True), plan.first_keys]
    sent = torch.tensor(columns, dtype=torch.int64).to(batch.device, non_blocking=True)  # [7, G], in one transfer
    requests, first_tokens, query_lens, seq_lens, sliding_windows, right_windows, first_keys = sent[:, :, None]
    rows = torch.arange(plan.first_row, plan.first_row + plan.num_rows, device=batch.device)
    valid = rows < query_lens
    contexts = seq_lens - query_lens
    positions = contexts + rows
    keys = first_keys + torch.arange(plan.num_keys, device=batch.device)
    tokens = torch.where(valid, first_tokens + rows, num_tokens)
    limits = Limits(
        seq_lens,
        sliding_windows=None if rules.sliding_window is None else sliding_windows,
        right_windows=None if rules.right_window is None else right_windows,
    )
    visible = visible_keys(positions, keys, limits, causal=rules.causal) & valid[:, :, None]
    query_bias = None
    if rules.query_bias is not None and rules.query_bias.shape[1] > 0:
        query_bias = _gather_query_bias(rules.query_bias, tokens, keys - contexts, visible)
        visible = visible & (query_bias != -torch.inf)
        query_bias = torch.where(visible, query_bias, 0.0)
    return Places(requests[:, 0], tokens, valid, positions, keys, visible, query_bias)


def _numbers(request: Request) -> tuple[int, ...]:
    rules = request.rules
    windows = rules.sliding_window or 0, rules.right_window or 0
    return request.index, request.first_token, request.query_len, request.seq_len, *windows


def _gather_query_bias(query_bias: Tensor, tokens: Tensor, new_keys: Tensor, visible: Tensor) -> Tensor:
    """Entry (token, i) for the i-th new key, [G, T, L] float64; 0 for cached keys and for i >= bias_width."""
    num_tokens, width = query_bias.shape
    columns = new_keys.clamp(0, width - 1)[:, None, :]
    entries = query_bias[tokens.clamp(max=num_tokens - 1)[:, :, None], columns].double()
    has_entry = ((new_keys >= 0) & (new_keys < width))[:, None, :]
    return torch.where(has_entry & visible, entries, 0.0)


def _gather_queries(q: Tensor, places: Places, num_kv_heads: int, scale: Tensor | None) -> Tensor:
    """q's rows as [G, T, num_kv_heads, group_size, D] float64."""
    found = as_bytes(q)[places.tokens.clamp(max=q.shape[0] - 1)].view(q.dtype)
    rows = wide_by_head(found.unflatten(2, (num_kv_heads, -1)), dim=1)
    rows.masked_fill_(~places.visible.any(dim=2)[:, :, None, None, None], 0.0)
    factor = per_head(scale)
    return rows if factor is None else rows * factor[:, None, None]


def _slots(places: Places, batch: Batch, num_blocks: int, block_size: int) -> Slots | None:
    """Where the keys of `places` lie; None where there is no slot at all, and so nothing that could be seen."""
    if num_blocks == 0 or batch.max_blocks == 0:
        return None
    columns = (places.keys // block_size).clamp(max=batch.max_blocks - 1)
    blocks = batch.block_table[places.requests[:, None], columns]
    hidden = ~places.readable
    return Slots(hidden, blocks.masked_fill(hidden, 0), places.keys % block_size)


def _gather_keys(cache: Tensor, places: Places, slots: Slots | None, scale: Tensor | None) -> Tensor:
    """The cache's rows in these slots as [G, L, num_kv_heads, D] float64."""
    if slots is None:
        return torch.zeros(*places.keys.shape, *cache.shape[2:], dtype=torch.float64, device=cache.device)
    values = wide_by_head(as_bytes(cache)[slots.blocks, slots.offsets].view(cache.dtype), dim=1)
    values.masked_fill_(slots.hidden[:, :, None, None], 0.0)
    factor = per_head(scale)
    return values if factor is None else values * factor[:, None]


def wide_by_head(values: Tensor, dim: int) -> Tensor:
    """The values in float64, in new memory in which dimension `dim` comes after those up to the last, D.

    For [G, T, heads..., D] and dim 1 that is memory by [G, heads..., T, D]; the shape stays.
    """
    last = values.dim() - 2
    moved = values.movedim(dim, last).to(torch.float64, memory_format=torch.contiguous_format, copy=True)
    return moved.movedim(last, dim)


def as_bytes(tensor: Tensor) -> Tensor:
    """float8 as bytes: torch does not index float8 on every device."""
    return tensor.view(torch.uint8) if tensor.dtype == FLOAT8 else tensor
