"""The plan lists exactly the work that the lengths ask for, within its scratch, whatever the batch."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from pageproof.optimized import Batch, Capacity, make_plan, operators
from pageproof.optimized.kernels import work_lists
from pageproof.optimized.tuning import GPU_LIMITS, PlanBlock, PlanLimits, plan_block, plan_limits, plan_programs

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


def split_width(requests: list[tuple[int, int]], limits: PlanLimits, programs: int, request_programs: int = 8) -> int:
    """Of the widths on the ladder whose partial results fit, the one that is walked through first."""
    short = [(n, length) for n, length in requests if 0 < n <= limits.decode_tokens]
    costs = {}
    for width in [limits.split_base << level for level in range(15)] + [WHOLE]:
        splits = [splits_of(length, width) for _, length in short]
        if sum(n * count for (n, _), count in zip(short, splits, strict=True) if count > 1) <= limits.partial_rows:
            length = min(width, max((length for _, length in short), default=1) or 1)
            rounds = math.ceil(Fraction(request_programs * sum(length for _, length in short), programs * length))
            begun = math.ceil(Fraction(request_programs * sum(splits), programs))
            costs[width] = rounds * length + limits.split_cost * begun
    return min(costs, key=lambda width: (costs[width], width))


def wanted_lists(requests: list[tuple[int, int]], width: int, limits: PlanLimits) -> dict[str, list[tuple[int, ...]]]:
    """(request, index, first row, new tokens, keys, splits, first row of partial results, split) of every item."""
    prefill, decode, merge = [], [], []
    first_row = next_partial = 0
    for request, (query_len, seq_len) in enumerate(requests):
        is_short = 0 < query_len <= limits.decode_tokens
        splits = splits_of(seq_len, width) if is_short else 0
        rest = (first_row, query_len, seq_len, splits, next_partial, width)
        if query_len > limits.decode_tokens:
            prefill += [(request, tile, *rest) for tile in range(-(-query_len // limits.tile_tokens))]
        decode += [(request, split, *rest) for split in range(splits)]
        if splits > 1:
            merge += [(request, token, *rest) for token in range(query_len)]
            # No two splits share a row of scratch.
            next_partial += query_len * splits
        first_row += query_len
    return {"prefill": prefill, "decode": decode, "merge": merge}


def records(items: Tensor, count: Tensor) -> list[tuple[int, ...]]:
    places = (
        *(work_lists.REQUEST, work_lists.INDEX, work_lists.FIRST_ROW, work_lists.QUERY_LEN, work_lists.SEQ_LEN),
        *(work_lists.NUM_SPLITS, work_lists.FIRST_PARTIAL, work_lists.SPLIT_KEYS),
    )
    return [tuple(record) for record in items[: int(count), [place.value for place in places]].tolist()]


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
        monkeypatch.setattr("pageproof.optimized.plan.plan_block", lambda num_requests: PlanBlock(8192, 1, 8192))
    check([(1, i % 3) for i in range(65_537)] + [(18, 40), (2, 70)], pageproof_device)
    check([(17, 17)] * 65_537, pageproof_device)


@pytest.mark.parametrize("block", [16, 64, 1024])
@pytest.mark.parametrize("programs", [1, 5, 64])
def test_any_number_of_programs_writes_the_same_plan(
    programs: int, block: int, monkeypatch: pytest.MonkeyPatch, pageproof_device: torch.device
) -> None:
    """Shares of several programs, programs without a share, and sums over what other programs list."""
    monkeypatch.setattr("pageproof.optimized.plan.plan_block", lambda num_requests: PlanBlock(block, 2, 4))
    monkeypatch.setattr("pageproof.optimized.plan.num_programs", lambda device: programs)
    for name in ("only padding", "at the edges", "one very long"):
        check(BATCHES[name] + BATCHES["prefill"] * 4, pageproof_device)


def test_the_smallest_block_that_holds_all_requests_is_taken() -> None:
    largest = plan_block(2**20).requests
    for num_requests in (0, 1, 63, 64, 65, 256, 257, 5000):
        block = plan_block(num_requests)
        assert num_requests <= block.requests or block.requests == largest
        assert all(number.bit_count() == 1 for number in block)


def check(requests: list[tuple[int, int]], device: torch.device, request_programs: int = 8) -> None:
    limits = plan_limits()
    capacity = Capacity(sum(query_len for query_len, _ in requests), len(requests), 200_000)
    plan = make_plan(batch_of(requests, device), capacity, request_programs=request_programs, validate=True)
    counts = plan.counts.cpu()
    width = split_width(requests, limits, plan_programs(device), request_programs)
    wanted = wanted_lists(requests, width, limits)
    assert int(counts[work_lists.ONE_TILE.value]) == 0
    assert records(plan.prefill_items, counts[work_lists.NUM_PREFILL_ITEMS.value]) == wanted["prefill"]
    assert records(plan.decode_items, counts[work_lists.NUM_DECODE_ITEMS.value]) == wanted["decode"]
    assert records(plan.merge_items, counts[work_lists.NUM_MERGE_ITEMS.value]) == wanted["merge"]
    assert int(counts[work_lists.NUM_ROWS.value]) == sum(query_len for query_len, _ in requests)
    # A split's partial results are a row for each token.
    partial_rows = sum(query_len for _, _, _, query_len, _, splits, *_ in wanted["decode"] if splits > 1)
    assert int(counts[work_lists.NUM_PARTIAL_ROWS.value]) == partial_rows <= limits.partial_rows


def test_a_record_is_a_sector_of_memory(pageproof_device: torch.device) -> None:
    """32 bytes: one load of cold memory brings all of it."""
    plan = make_plan(batch_of([(1, 1), (20, 30)], pageproof_device), Capacity(21, 2, 30))
    for items in (plan.prefill_items, plan.decode_items, plan.merge_items):
        assert items[0].nbytes == 32 == items.stride(0) * items.itemsize
        assert items.data_ptr() % 32 == 0
    assert plan.counts.nbytes <= 32
    assert plan.counts.data_ptr() % 32 == 0


@pytest.mark.parametrize("requests", [[(1000, 10), (17, 20), (1, 30)], [(1, 2**31 - 1), (1, 2**30), (2, 100_000)]])
def test_lengths_above_the_capacity_overrun_no_list(
    requests: list[tuple[int, int]], pageproof_device: torch.device
) -> None:
    """What the lists hold is undefined then; what lies around them stays."""
    batch = batch_of(requests, pageproof_device)
    sizes = [(work_lists.NUM_COUNTS,), (3, 8), (2, 8), (plan_limits().partial_rows, 8)]
    around = [torch.full((size[0] + 64, *size[1:]), -7, dtype=torch.int32, device=pageproof_device) for size in sizes]
    written = [tensor[32:-32] for tensor in around]
    operators.call("make_plan", batch.cu_seqlens_q, batch.seq_lens, 8, False, *written)
    assert all(bool((tensor[:32] == -7).all()) and bool((tensor[-32:] == -7).all()) for tensor in around)
    assert int(written[0][work_lists.NUM_PREFILL_ITEMS.value]) <= 3
    assert int(written[0][work_lists.NUM_DECODE_ITEMS.value]) <= 2


@pytest.mark.parametrize(
    ("requests", "request_programs", "keys"),
    [
        ([(1, 4096)], 8, 128),  # 256 splits: with the next length half of the programs had none
        ([(1, 65536)], 8, 2048),  # the same, once around 264 programs
        ([(1, 8192)] * 64, 8, 8192),  # 512, just under twice: whole
        ([(1, 16384)] * 40, 8, 4096),  # 320 whole ones would leave most programs idle the second time around
        ([(1, 65536)], 1, 256),
        ([(1, 4096)] * 64, 1, 1024),
        ([(1, 65536)] + [(1, 4096)] * 63, 8, 2048),
    ],
)
def test_splits_keep_264_programs_equally_busy(
    requests: list[tuple[int, int]],
    request_programs: int,
    keys: int,
    monkeypatch: pytest.MonkeyPatch,
    pageproof_device: torch.device,
) -> None:
    """264 programs are two on each of an H200's multiprocessors."""
    monkeypatch.setattr("pageproof.optimized.plan.plan_limits", lambda: GPU_LIMITS)
    monkeypatch.setattr("pageproof.optimized.plan.plan_programs", lambda device: 264)
    capacity = Capacity(len(requests), len(requests), 65536)
    plan = make_plan(batch_of(requests, pageproof_device), capacity, request_programs=request_programs)
    split = int(plan.decode_items[0, work_lists.SPLIT_KEYS.value])
    assert split == split_width(requests, GPU_LIMITS, 264, request_programs) == keys


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (2**16 + 1, ValueError), (1.0, TypeError)])
def test_request_programs_are_checked(value: object, error: type[Exception], pageproof_device: torch.device) -> None:
    with pytest.raises(error, match=r"^request_programs: found .*, expected "):
        make_plan(batch_of([(1, 1)], pageproof_device), Capacity(1, 1, 1), request_programs=value)  # type: ignore[arg-type]


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
