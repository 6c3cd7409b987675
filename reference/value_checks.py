"""What may be asked of values in device memory. Looking there synchronises, so this runs under `validate` only."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .chunks import costs
from .errors import bad_value
from .problem import Batch, Rules, Scales
from .rows import Places, place_groups
from .visibility import key_range


def check_batch_values(
    batch: Batch,
    rules: Rules,
    *,
    num_tokens: int,
    num_blocks: int,
    block_size: int,
    scales: Scales | None = None,
) -> None:
    """Raise ValueError unless lengths, page ids, biases and scales are such that every visible key has a slot."""
    starts, seq_lens = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()
    _check_lengths(starts, seq_lens, num_tokens)
    _check_rule_values(rules)
    _check_query_bias(rules, batch)
    _check_scale_values(scales)
    _check_table_width(batch, rules, starts, seq_lens, block_size)
    for places in place_groups(batch, rules, num_tokens, costs(1, 1, batch.device)):
        _check_pages(places, batch, num_blocks, block_size)


def check_slots(slot_mapping: Tensor, *, num_blocks: int, block_size: int) -> None:
    """Raise ValueError on a slot past the pool's end, or on one that two rows are to be written to."""
    slots = slot_mapping[slot_mapping >= 0]
    if slots.numel() == 0:
        return
    largest = int(slots.max())
    num_slots = num_blocks * block_size
    if largest >= num_slots:
        raise bad_value("slot_mapping", f"slot {largest}", f"less than num_blocks * block_size = {num_slots}")
    ordered = slots.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.numel():
        raise bad_value("slot_mapping", f"slot {int(repeated[0])} twice", "every slot at most once")


def check_lse_values(**lses: Tensor) -> None:
    """Raise ValueError where an lse is NaN: not a part of anything."""
    for name, lse in lses.items():
        if bool(lse.isnan().any()):
            raise bad_value(name, "NaN", "a finite number, -inf or inf")


def _check_lengths(starts: list[int], seq_lens: list[int], num_tokens: int) -> None:
    if starts[0] != 0:
        raise bad_value("cu_seqlens_q", f"{starts[0]} as its first entry", "0")
    for request, (start, stop) in enumerate(pairwise(starts)):
        if stop < start:
            raise bad_value("cu_seqlens_q", f"{stop} after {start} at request {request}", "entries that never fall")
    if starts[-1] > num_tokens:
        raise bad_value("cu_seqlens_q", f"{starts[-1]} as its last entry", f"at most num_tokens = {num_tokens}")
    for request, seq_len in enumerate(seq_lens):
        if seq_len < 0:
            raise bad_value("seq_lens", f"{seq_len} at request {request}", "a length of at least 0")


def _check_rule_values(rules: Rules) -> None:
    if rules.sinks is not None and bool(rules.sinks.isnan().any()):
        raise bad_value("sinks", "NaN", "finite numbers, -inf or inf")
    if rules.alibi_slopes is not None and not bool(rules.alibi_slopes.isfinite().all()):
        raise bad_value("alibi_slopes", "NaN or inf", "finite numbers")


def _check_query_bias(rules: Rules, batch: Batch) -> None:
    """Entries of live tokens for new keys that exist; the others are not read."""
    if rules.query_bias is None:
        return
    query_lens = batch.cu_seqlens_q.diff().long()
    lens_of_tokens = query_lens.repeat_interleave(query_lens)
    live = rules.query_bias[: lens_of_tokens.shape[0]]
    read = torch.arange(live.shape[1], device=live.device) < lens_of_tokens[:, None]
    bad = torch.nonzero(read & (live.isnan() | (live == torch.inf)))
    if bad.shape[0]:
        token, column = bad[0].tolist()
        raise bad_value("query_bias", f"{live[token, column].item()} at [{token}, {column}]", "finite numbers or -inf")


def _check_scale_values(scales: Scales | None) -> None:
    for name in ("q", "k", "v", "out"):
        scale = None if scales is None else getattr(scales, name)
        if scale is not None and not bool((scale.isfinite() & (scale > 0)).all()):
            raise bad_value(f"scales.{name}", scale.flatten().tolist(), "finite positive numbers")


def _check_table_width(batch: Batch, rules: Rules, starts: list[int], seq_lens: list[int], block_size: int) -> None:
    """Columns for the keys that no query bias can hide; this also keeps absurd lengths from being expanded."""
    for request, seq_len in enumerate(seq_lens):
        query_len = starts[request + 1] - starts[request]
        context = seq_len - query_len
        start, stop = key_range(context, seq_len - 1, seq_len, rules)
        if rules.query_bias is not None:
            stop = min(stop, context)
        needed = -(-stop // block_size)
        if query_len > 0 and stop > start and needed > batch.max_blocks:
            raise bad_value(
                "block_table",
                f"{batch.max_blocks} columns",
                f"at least {needed} for request {request} (seq_len {seq_len}, block_size {block_size})",
            )


def _check_pages(places: Places, batch: Batch, num_blocks: int, block_size: int) -> None:
    readable = places.readable
    columns = places.keys // block_size
    beyond = torch.nonzero(readable & (columns >= batch.max_blocks))
    if beyond.shape[0]:
        group, key = beyond[0].tolist()
        request, column = int(places.requests[group]), int(columns[group, key])
        raise bad_value("block_table", f"{batch.max_blocks} columns", f"at least {column + 1} for request {request}")
    if batch.max_blocks == 0:
        return
    pages = batch.block_table[places.requests[:, None], columns.clamp(max=batch.max_blocks - 1)]
    bad = torch.nonzero(readable & ((pages < 0) | (pages >= num_blocks)))
    if bad.shape[0]:
        group, key = bad[0].tolist()
        where = f"[{int(places.requests[group])}, {int(columns[group, key])}]"
        raise bad_value("block_table", f"page {int(pages[group, key])} at {where}", f"0 <= page < {num_blocks}")
