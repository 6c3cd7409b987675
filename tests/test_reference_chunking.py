"""A token's result does not depend on how its request was cut into steps, nor on how the reference cuts its work."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from pageproof.reference import Batch, attention, chunks

from .reference_cases import close, draw


@pytest.mark.parametrize("seed", range(400, 440))
def test_chunked_prefill_equals_the_whole_one(seed: int) -> None:
    """Also with ALiBi beside a sink; the query bias is left out, since it speaks of the step's own new keys."""
    # Later chunks of a non-causal prefill show the earlier ones keys that they had not seen.
    problem = draw(seed, causal=True, right_window=None, query_bias=None)
    out, lse = attention(*problem.arguments)
    rng = random.Random(seed)
    table = problem.batch.block_table
    start = 0
    for request, (query_len, seq_len) in enumerate(zip(problem.query_lens, problem.seq_lens, strict=True)):
        first = 0
        while first < query_len:
            size = rng.randrange(1, query_len - first + 1)
            last_key = seq_len - query_len + first + size
            rows = slice(start + first, start + first + size)
            first += size
            if last_key < 0:  # rows before the request's first key: no step would hold them alone
                continue
            batch = Batch(
                torch.tensor([0, size], dtype=torch.int32),
                torch.tensor([last_key], dtype=torch.int32),
                table[request : request + 1],
            )
            step_out, step_lse = attention(problem.q[rows], problem.k_cache, problem.v_cache, batch, problem.rules)
            close(out[rows], step_out, 1e-14)
            close(lse[rows], step_lse, 1e-14)
        start += query_len


@pytest.mark.parametrize("seed", range(440, 470))
def test_the_memory_budget_does_not_show(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw(seed)
    out, lse = attention(*problem.arguments)
    monkeypatch.setitem(chunks.BUDGET, "cpu", 1)
    monkeypatch.setitem(chunks.TRIVIAL, "cpu", 1)
    row_out, row_lse = attention(*problem.arguments)
    close(out, row_out, 1e-14)
    close(lse, row_lse, 1e-14)


def plan(query_lens: list[int], seq_lens: list[int], window: int | None, budget: int) -> list[chunks.ChunkPlan]:
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).int()
    batch = Batch(starts, torch.tensor(seq_lens, dtype=torch.int32), torch.zeros(len(query_lens), 1, dtype=torch.int32))
    rules = replace(draw(0).rules, causal=True, sliding_window=window, right_window=None, query_bias=None)
    return list(chunks.plan_chunks(chunks.read_requests(batch, rules), chunks.Costs(8, 256, budget, budget // 64)))


def test_every_chunk_keeps_to_the_budget_and_every_row_occurs_once() -> None:
    rng = random.Random(0)
    query_lens = [rng.choice((0, 1, 1, 7, 300)) for _ in range(64)]
    seq_lens = [query_len + rng.choice((0, 100, 5000)) for query_len in query_lens]
    budget = 2**22
    rows = set()
    for item in plan(query_lens, seq_lens, None, budget):
        assert len(item.requests) * item.num_keys * (8 * item.num_rows + 256) <= budget
        for request in (member.index for member in item.requests):
            for row in range(item.first_row, min(item.first_row + item.num_rows, query_lens[request])):
                assert (request, row) not in rows
                rows.add((request, row))
    assert len(rows) == sum(query_lens)


def test_keys_left_of_every_window_are_not_gathered() -> None:
    plans = plan([1, 4, 4096], [131072, 131072, 131072], 128, 2**22)
    assert max(item.num_keys for item in plans) < 2048


def test_equal_requests_are_one_chunk() -> None:
    assert len(plan([1] * 50, list(range(100, 150)), None, 2**25)) == 1
