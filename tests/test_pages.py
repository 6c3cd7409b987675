"""Pages are scattered, shared and repeated as the case says, and nobody's pages are there unless it says otherwise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pageproof import reference
from pageproof.oracle.building.tensors import build
from pageproof.oracle.case import BatchShape, Case, Spec

BATCH = BatchShape(query_lens=(1, 9, 0, 4), seq_lens=(50, 9, 0, 37), padding_tokens=2, table_slack=2, shared_blocks=2)


def make(**changes: object) -> Case:
    return Case(spec=replace(Spec(head_size=32, head_size_v=48, block_size=8), **changes), batch=BATCH, seed=7)  # type: ignore[arg-type]


def answer(case: Case) -> tuple[Tensor, Tensor]:
    return reference.attention(**build(case).arguments, validate=True)


def test_a_pool_without_spare_pages_is_all_in_use() -> None:
    case = make().with_batch(seq_lens=(50, 9, 0, 37), spare_blocks=False, shared_blocks=0)
    problem = build(replace(case, poison="bcde"))
    table = problem.arguments["batch"].block_table
    used = [-(-length // 8) for length in case.batch.seq_lens]
    pages = sorted(int(page) for row, count in zip(table, used, strict=True) for page in row[:count])
    assert pages == list(range(problem.arguments["k_cache"].shape[0]))
    assert torch.equal(answer(case)[0], answer(case.with_batch(spare_blocks=True))[0])


def test_a_page_stands_twice_in_every_request_of_two_pages() -> None:
    distances = set()
    for seed in range(16):
        case = replace(make(), seed=seed, poison="bcde").with_batch(repeated_blocks=True, shared_blocks=0)
        table = build(case).arguments["batch"].block_table
        for row, used in zip(table, (7, 2, 0, 5), strict=True):
            pages = row[:used].tolist()
            assert len(set(pages)) == used - (used >= 2)
            twice = [column for column, page in enumerate(pages) if pages.count(page) == 2]
            distances |= {twice[1] - twice[0]} if twice else set()
    assert {1, 2, 3, 4} <= distances


def test_a_page_that_stands_twice_holds_the_same_keys_twice() -> None:
    """Eight keys in one page, named twice: each weight halves, so the output stays and the lse grows by log 2."""
    spec = make(dtype="float32", causal=False).spec
    once = Case(spec=spec, batch=BatchShape(query_lens=(1,), seq_lens=(8,)), seed=7)
    twice = once.with_batch(seq_lens=(16,), repeated_blocks=True)
    for seed in range(4):
        (out, lse), (out_twice, lse_twice) = (answer(replace(case, seed=seed)) for case in (once, twice))
        torch.testing.assert_close(out_twice, out)
        torch.testing.assert_close(lse_twice, lse + float(np.log(2.0)))


def test_pages_are_scattered_and_some_belong_to_nobody() -> None:
    case = replace(make(), batch=BatchShape(query_lens=(1,) * 6, seq_lens=(100,) * 6))
    problem = build(case)
    table = problem.arguments["batch"].block_table
    assert table.unique().numel() == table.numel() == 6 * 13
    assert 0 not in table
    assert (table.diff() == 1).float().mean() < 0.2
    assert problem.arguments["k_cache"].shape[0] > table.numel() + 2


def test_shared_pages_lead_where_a_request_is_long_enough() -> None:
    case = make().with_batch(seq_lens=(50, 15, 16, 37), query_lens=(1, 9, 3, 4), table_slack=0)
    table = build(replace(case, poison="")).arguments["batch"].block_table
    assert torch.equal(table[0, :2], table[2, :2])
    assert torch.equal(table[0, :2], table[3, :2])
    assert not set(table[0].tolist()) & set(table[1, :2].tolist())
    own = [*table[0, 2:7].tolist(), *table[3, 2:5].tolist()]
    assert len(set(own)) == len(own)


def test_now_and_then_a_page_stands_twice_in_a_row() -> None:
    tables = [build(replace(make(), seed=seed, poison="")).arguments["batch"].block_table[0] for seed in range(16)]
    repeats = [int(table[0]) == int(table[1]) for table in tables]
    assert 0 < sum(repeats) < 16
