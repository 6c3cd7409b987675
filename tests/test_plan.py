"""The plan lists exactly the work that the lengths ask for, within its scratch, whatever the batch."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pageproof.optimized import Batch, Capacity, make_plan
from pageproof.optimized.kernels import plan as kernels
from pageproof.optimized.tuning import PlanLimits, plan_limits

WHOLE = 2**30

BATCHES: dict[str, list[tuple[int, int]]] = {
    "no requests": [],
    "only padding": [(0, 0)] * 5,
    "one token": [(1, 1)],
    "no keys": [(3, 0), (40, 0)],
    "decode": [(1, 1000 + i) for i in range(7)],
    "prefill": [(17, 17), (33, 100), (65, 65), (64, 900)],
    "at the edges": [(16, 64), (17, 65), (1, 63), (1, 64), (1, 65), (32, 32), (33, 33), (0, 0), (16, 256), (16, 257)],
    "one very long": [(1, 10), (1, 100_000), (2, 20)],
    "longer than its keys": [(20, 3), (9, 2)],
    "more requests than a block": [(i % 4, 50 * i) for i in range(150)],
}


def batch_of(requests: list[tuple[int, int]], device: torch.device) -> Batch:
    lengths = torch.tensor([query_len for query_len, _ in requests], dtype=torch.int32)
    cu_seqlens_q = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)])
    seq_lens = torch.tensor([seq_len for _, seq_len in requests], dtype=torch.int32)
    table = torch.zeros(len(requests), 1, dtype=torch.int32)
    return Batch(cu_seqlens_q.to(device), seq_lens.to(device), table.to(device))


def splits_of(seq_len: int, width: int) -> int:
    return max(-(-seq_len // width), 1)


def split_width(requests: list[tuple[int, int]], limits: PlanLimits) -> int:
    """The shortest width on the ladder whose partial results fit."""
    widths = [limits.split_base << level for level in range(15)] + [WHOLE]
    for width in widths:
        rows = [
            n * splits_of(length, width)
            for n, length in requests
            if n <= limits.decode_tokens and splits_of(length, width) > 1
        ]
        if sum(rows) <= limits.partial_rows:
            return width
    raise AssertionError("the widest split always fits")


def wanted_lists(requests: list[tuple[int, int]], limits: PlanLimits) -> dict[str, list[tuple[int, int]]]:
    width = split_width(requests, limits)
    prefill, decode, merge = [], [], []
    for request, (query_len, seq_len) in enumerate(requests):
        splits = splits_of(seq_len, width)
        if query_len > limits.decode_tokens:
            prefill += [(request, tile) for tile in range(-(-query_len // limits.tile_tokens))]
        elif query_len > 0:
            decode += [(request, split) for split in range(splits)]
            merge += [(request, token) for token in range(query_len) if splits > 1]
    return {"prefill": prefill, "decode": decode, "merge": merge}


def pairs(items: Tensor, count: Tensor) -> list[tuple[int, int]]:
    return [(int(request), int(index)) for request, index in items[: int(count)].cpu()]


@pytest.mark.parametrize("name", BATCHES)
def test_lists_are_what_the_lengths_ask_for(name: str, pageproof_device: torch.device) -> None:
    check(BATCHES[name], pageproof_device)


def test_lists_of_random_batches(pageproof_device: torch.device) -> None:
    rng = random.Random(3)
    for _ in range(12):
        lengths = [0, 1, 2, 15, 16, 17, 31, 32, 33, 100]
        keys = [0, 1, 63, 64, 65, 128, 500, 3000, 40_000]
        check([(rng.choice(lengths), rng.choice(keys)) for _ in range(rng.randrange(1, 90))], pageproof_device)


def test_more_requests_than_sixteen_bits_count(monkeypatch: pytest.MonkeyPatch, pageproof_device: torch.device) -> None:
    if pageproof_device.type == "cpu":  # the interpreter pays by the step, not by the request
        limits = replace(plan_limits(), block=8192)
        monkeypatch.setattr("pageproof.optimized.plan.plan_limits", lambda: limits)
    check([(1, i % 3) for i in range(65_537)] + [(18, 40), (2, 70)], pageproof_device)
    check([(17, 17)] * 65_537, pageproof_device)


def check(requests: list[tuple[int, int]], device: torch.device) -> None:
    limits = plan_limits()
    num_tokens = sum(query_len for query_len, _ in requests)
    plan = make_plan(batch_of(requests, device), Capacity(num_tokens, len(requests), 200_000), validate=True)
    counts = plan.counts.cpu()
    wanted = wanted_lists(requests, limits)
    assert int(counts[kernels.SPLIT_KEYS.value]) == split_width(requests, limits)
    assert pairs(plan.prefill_items, counts[kernels.NUM_PREFILL_ITEMS.value]) == wanted["prefill"]
    assert pairs(plan.decode_items, counts[kernels.NUM_DECODE_ITEMS.value]) == wanted["decode"]
    assert pairs(plan.merge_items, counts[kernels.NUM_MERGE_ITEMS.value]) == wanted["merge"]
    assert int(counts[kernels.NUM_PARTIAL_ROWS.value]) <= limits.partial_rows
    check_partial_rows(requests, plan.offsets[3].tolist(), limits)


def check_partial_rows(requests: list[tuple[int, int]], offsets: list[int], limits: PlanLimits) -> None:
    """No two splits share a row of scratch."""
    width = split_width(requests, limits)
    next_row = 0
    for (query_len, seq_len), offset in zip(requests, offsets, strict=False):
        splits = splits_of(seq_len, width)
        is_split = 0 < query_len <= limits.decode_tokens and splits > 1
        assert offset == next_row
        next_row += query_len * splits if is_split else 0
    assert offsets[-1] == next_row


def test_capacities_are_checked(pageproof_device: torch.device) -> None:
    batch = batch_of([(4, 100), (1, 7)], pageproof_device)
    with pytest.raises(ValueError, match=r"^capacity\.num_requests: found 1, expected at least the batch's 2$"):
        make_plan(batch, Capacity(5, 1, 100))
    with pytest.raises(ValueError, match=r"^cu_seqlens_q: found 5 tokens, expected at most the capacity's 4$"):
        make_plan(batch, Capacity(4, 2, 100), validate=True)
    with pytest.raises(ValueError, match=r"^seq_lens: found a length of 100, expected at most the capacity's 99$"):
        make_plan(batch, Capacity(5, 2, 99), validate=True)
    with pytest.raises(TypeError, match=r"^capacity: found int 5, expected a Capacity"):
        make_plan(batch, 5)  # type: ignore[arg-type]
