"""Programs ask for their first item before they know whether the list has one: they stay inside of the list, and what
they find beyond its end is not used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pageproof import optimized
from pageproof.optimized import Capacity, interpreter, make_plan, shapes
from pageproof.optimized.kernels import work_lists
from pageproof.optimized.tuning import PlanLimits, plan_limits
from pageproof.oracle import BatchShape, Case, Spec
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.building.tensors import build
from pageproof.oracle.checks.reads import wrong_accesses

OTHER = (0, 0, 0, 1, 1, 1, 0, 0)  # a record that ends no program, but writes the first row for its first key alone
LONG = 2 * plan_limits().split_base + 5
LISTS = {"prefill": work_lists.NUM_PREFILL_ITEMS, "decode": work_lists.NUM_DECODE_ITEMS}
LISTS["merge"] = work_lists.NUM_MERGE_ITEMS

# With how many heads, new tokens and keys a list has no item, one program's, or several of one request.
BATCHES: dict[str, tuple[int, int, list[tuple[int, int]]]] = {
    "nothing": (1, 1, []),
    "prefill only": (2, 1, [(20, 30)]),
    "whole": (1, 2, [(1, 9)]),
    "one row to merge": (1, 1, [(1, LONG)]),
    "rows for some programs": (1, 3, [(1, LONG), (0, 0), (1, 7)]),
    "several tiles of a split": (1, 12, [(16, 40), (3, LONG)]),
}


def case_of(name: str) -> Case:
    num_kv_heads, group, requests = BATCHES[name]
    spec = Spec(head_size=16, head_size_v=16, num_kv_heads=num_kv_heads, group_size=group)
    lengths = BatchShape(
        query_lens=tuple(n for n, _ in requests), seq_lens=tuple(keys for _, keys in requests), padding_tokens=2
    )
    return Case(spec=spec, batch=lengths, seed=2)


@pytest.mark.parametrize("name", BATCHES)
def test_what_lies_beyond_the_items_is_not_used(name: str, pageproof_device: torch.device) -> None:
    case = case_of(name)
    arguments = build(case, pageproof_device).arguments
    capacity = Capacity(arguments["q"].shape[0], case.batch.num_requests, max(case.batch.seq_lens, default=0))
    plan = make_plan(arguments["batch"], capacity, request_programs=case.spec.num_kv_heads)
    counts = plan.counts.tolist()
    for items, place in zip((plan.prefill_items, plan.decode_items, plan.merge_items), LISTS.values(), strict=True):
        items[counts[place.value] :] = torch.tensor(OTHER, dtype=torch.int32, device=items.device)
    expected = [each.clone() for each in optimized.attention(**arguments)]
    found = optimized.attention(**arguments, plan=plan)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


@pytest.fixture
def short_lists(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lists of fewer items than there are programs."""
    limits = PlanLimits(decode_tokens=16, tile_tokens=32, split_base=64, split_cost=64, partial_rows=1)
    for module in ("plan", "shapes", "launch"):
        monkeypatch.setattr(f"pageproof.optimized.{module}.plan_limits", lambda: limits)
    cached = (shapes.attention_sizes, shapes.prefill_constants, shapes.decode_constants, shapes.merge_constants)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.skipif(not interpreter.INTERPRETED, reason="kernels are compiled here, not interpreted")
@pytest.mark.usefixtures("short_lists")
def test_lists_of_fewer_items_than_programs_are_not_overrun() -> None:
    assert wrong_accesses(Ours(), build(case_of("nothing"))) == []
