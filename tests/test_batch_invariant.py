"""A request has the same bits alone and in any batch, where its plan is made to be batch-invariant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof import optimized
from pageproof.optimized import Batch, Capacity, make_plan
from pageproof.optimized.kernels import work_lists
from pageproof.optimized.tuning import OWN_SPLITS, plan_limits
from pageproof.oracle import BatchShape, Case, Spec
from pageproof.oracle.building.tensors import build

# (new tokens, keys): decode and verification, with one split and with many, none at all, a prefill; and padding.
LENGTHS = ((1, 900), (3, 700), (1, 1), (5, 5), (1, 0), (1, 129), (20, 150), (16, 400))
SPECS = {
    "attention": Spec(num_kv_heads=2, group_size=3, head_size=16, head_size_v=16),
    "window and sinks": Spec(
        num_kv_heads=1, group_size=8, head_size=16, head_size_v=16, sliding_window=300, sinks=True
    ),
    "mla": Spec(operation="mla_attention", num_kv_heads=1, group_size=5, head_size=32, rope_head_size=16),
}
Answer = tuple[Tensor, Tensor]


def answers(
    arguments: dict[str, Any], operation: str, order: list[int], *, padding: int, roomy: int, **options: Any
) -> dict[int, Answer]:
    """What the requests get, by their number, in a batch of those in `order` with padding after them."""
    whole, device = arguments["batch"], arguments["batch"].device
    starts = whole.cu_seqlens_q.tolist()
    rows = torch.cat([torch.arange(starts[request], starts[request + 1]) for request in order])
    queries = {name: arguments[name] for name in ("q", "q_nope", "q_pe") if name in arguments}
    given = {name: torch.cat([q[rows], q.new_full((padding, *q.shape[1:]), torch.nan)]) for name, q in queries.items()}
    lengths = [starts[request + 1] - starts[request] for request in order] + [0] * padding
    ends = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    none = torch.zeros(padding, dtype=torch.int32, device=device)
    seq_lens = torch.cat([whole.seq_lens[order], none])
    table = torch.cat([whole.block_table[order], none[:, None].expand(-1, whole.max_blocks)])
    batch = Batch(ends, seq_lens, table)
    capacity = Capacity(len(rows) + padding + roomy, len(seq_lens) + roomy, 900)
    plan = make_plan(batch, capacity, **options)
    rest = {name: value for name, value in arguments.items() if name not in (*queries, "batch", "out", "lse")}
    out, lse = getattr(optimized, operation)(**given, **rest, batch=batch, plan=plan)
    parts = ends.tolist()
    return {request: (out[a:b], lse[a:b]) for request, a, b in zip(order, parts, parts[1:], strict=False)}


def differing(spec: Spec, device: torch.device, other: dict[str, Any], **options: Any) -> list[int]:
    """The requests that do not have the same bits alone as in several batches, one of them planned with `other` too."""
    query_lens, seq_lens = zip(*LENGTHS, strict=True)
    case = Case(spec=spec, batch=BatchShape(query_lens=query_lens, seq_lens=seq_lens), seed=3, poison="")
    arguments = dict(build(case, device).arguments)
    every = list(range(len(LENGTHS)))
    batches = [
        answers(arguments, spec.operation, every, padding=0, roomy=0, **options),
        answers(arguments, spec.operation, every[::-1], padding=3, roomy=40, **options | other),
        answers(arguments, spec.operation, [4, 1, 0], padding=1, roomy=0, **options),
    ]
    found = []
    for request in every:
        alone = answers(arguments, spec.operation, [request], padding=0, roomy=0, **options)[request]
        same = [batch[request] for batch in batches if request in batch]
        if not all(torch.equal(one, other) for got in same for one, other in zip(got, alone, strict=True)):
            found.append(request)
    return found


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_request_has_the_same_bits_in_every_batch(spec: Spec, pageproof_device: torch.device) -> None:
    assert differing(spec, pageproof_device, {"request_programs": 64}, batch_invariant=True) == []


def test_it_has_not_where_splits_follow_the_batch(
    monkeypatch: pytest.MonkeyPatch, pageproof_device: torch.device
) -> None:
    """Room for fewer partial results than the batch would need leaves its long requests whole, but not a lone one."""
    few = replace(plan_limits(), partial_rows=24)
    monkeypatch.setattr("pageproof.optimized.plan.plan_limits", lambda: few)
    assert 0 in differing(SPECS["attention"], pageproof_device, {})


def test_splits_are_a_few_of_each_request(pageproof_device: torch.device) -> None:
    base = plan_limits().split_base
    lengths = [(1, 0), (1, 2 * base), (1, 2 * base + 1), (1, 2**20), (16, 10_000), (3, 64 * base), (17, 100)]
    starts = torch.tensor([0, *(n for n, _ in lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    keys = torch.tensor([length for _, length in lengths], dtype=torch.int32)
    table = torch.zeros(len(lengths), 1, dtype=torch.int32)
    batch = Batch(*(tensor.to(pageproof_device) for tensor in (starts, keys, table)))
    plan = make_plan(batch, Capacity(64, len(lengths), 2**20), batch_invariant=True)
    items = plan.decode_items[: int(plan.counts[work_lists.NUM_DECODE_ITEMS.value])].tolist()
    split_of = {item[work_lists.REQUEST.value]: item[work_lists.SPLIT_KEYS.value] for item in items}
    splits = {request: sum(item[work_lists.REQUEST.value] == request for item in items) for request in split_of}
    for request, (n, length) in enumerate(lengths[:-1]):
        split = split_of[request]
        assert splits[request] == max(1, -(-length // split))
        assert n * splits[request] <= OWN_SPLITS
        assert split == 2 * base or n * -(-length // (split // 2)) > OWN_SPLITS  # no longer than it has to be
    assert len(plan.merge_items) >= OWN_SPLITS * len(lengths)
    assert int(plan.counts[work_lists.ONE_TILE.value]) == 1


def test_the_switch_is_checked(pageproof_device: torch.device) -> None:
    lengths = torch.tensor([0, 1], dtype=torch.int32, device=pageproof_device)
    batch = Batch(lengths, lengths[1:], lengths[:1, None])
    with pytest.raises(TypeError, match=r"^batch_invariant: found .*, expected a bool"):
        make_plan(batch, Capacity(1, 1, 1), batch_invariant=1)  # type: ignore[arg-type]
