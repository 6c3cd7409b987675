"""The reference reads as data only what some row of the request may see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pageproof.reference import Batch, Rules, attention
from pageproof.reference.attention import attention_rows
from pageproof.reference.chunks import costs
from pageproof.reference.rows import place_groups

from .reference_cases import close, draw, empty_rows


@pytest.mark.parametrize("seed", range(600, 640))
def test_visible_keys_are_those_of_the_table_one_by_one(seed: int) -> None:
    problem = draw(seed)
    expected = {row: set(problem.sees(*row)) for row in problem.rows()}
    seen: dict[tuple[int, int, int], set[int]] = {}
    for places in place_groups(problem.batch, problem.rules, problem.q.shape[0], costs(1, 1, problem.q.device)):
        for g, t in places.valid.nonzero().tolist():
            row = (int(places.requests[g]), int(places.tokens[g, t]), int(places.positions[g, t]))
            assert row not in seen
            seen[row] = set(places.keys[g][places.visible[g, t]].tolist())
        assert not places.visible[~places.valid].any()
    assert seen == expected


@pytest.mark.parametrize("poison", [float("inf"), -float("inf"), 3e4, 0.0])
@pytest.mark.parametrize("seed", range(640, 650))
def test_what_lies_in_unreadable_slots_changes_no_bit(seed: int, poison: float) -> None:
    problem = draw(seed)
    out, lse = attention(*problem.arguments)
    other = draw(seed)
    for tensor in (other.q, other.k_cache, other.v_cache, other.rules.query_bias):
        if tensor is not None:
            tensor[tensor.isnan()] = poison
    other.batch.block_table[other.batch.block_table < 0] = 2**31 - 1
    other_out, other_lse = attention(*other.arguments)
    assert torch.equal(out, other_out)
    assert torch.equal(lse, other_lse)


def test_the_poison_is_there() -> None:
    """The tests above say something only if slots, rows and table entries really are poisoned."""
    slots = rows = entries = empty = 0
    for seed in range(600, 690):
        problem = draw(seed)
        slots += int(problem.k_cache.isnan().sum())
        rows += int(problem.q.isnan().sum())
        entries += int((problem.batch.block_table.abs() > 10**6).sum())
        empty += len(empty_rows(problem))
    assert min(slots, rows, entries, empty) > 50


def test_float8_nan_bytes_are_not_read() -> None:
    for seed in range(650, 660):
        problem = draw(seed)
        eight = replace(
            problem,
            k_cache=problem.k_cache.to(torch.float8_e4m3fn),
            v_cache=problem.v_cache.to(torch.float8_e4m3fn),
        )
        out, lse = attention(*eight.arguments)
        wide = replace(problem, k_cache=eight.k_cache.double(), v_cache=eight.v_cache.double())
        expected_out, expected_lse = attention(*wide.arguments)
        assert torch.equal(out, expected_out)
        assert torch.equal(lse, expected_lse)


def test_a_column_that_the_query_bias_hides_may_be_missing_from_the_table() -> None:
    """Keys 8 and 9 lie in a third page; both are new, and no row may see them."""
    q = torch.randn(2, 1, 4, dtype=torch.float64)
    k_cache, v_cache = torch.randn(2, 2, 4, 1, 4, dtype=torch.float64)
    starts, seq_lens = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([10], dtype=torch.int32)
    batch = Batch(starts, seq_lens, torch.tensor([[1, 0]], dtype=torch.int32))
    rules = Rules(softmax_scale=0.5, query_bias=torch.full((2, 2), -torch.inf))
    out, lse = attention(q, k_cache, v_cache, batch, rules, validate=True)
    context = Batch(starts, torch.tensor([8], dtype=torch.int32), batch.block_table)
    expected_out, expected_lse = attention(q, k_cache, v_cache, context, Rules(softmax_scale=0.5, causal=False))
    close(out, expected_out)
    close(lse, expected_lse)


def test_empty_rows_are_zero_and_their_lse_is_the_sink() -> None:
    checked = 0
    for seed in range(660, 690):
        problem = draw(seed)
        out, lse = attention(*problem.arguments)
        rows = empty_rows(problem)
        sinks = problem.rules.sinks
        expected = torch.full_like(lse, -torch.inf) if sinks is None else sinks.double().expand_as(lse)
        assert bool((out[rows] == 0).all())
        assert torch.equal(lse[rows], expected[rows])
        checked += len(rows)
    assert checked > 50


def test_an_infinite_sink_takes_all_the_weight_and_a_negative_one_none() -> None:
    problem = draw(3, query_bias=None)
    heads = problem.q.shape[1]
    plain_out, plain_lse = attention(*problem.with_rules(sinks=None).arguments)
    out, lse = attention(*problem.with_rules(sinks=torch.full((heads,), -torch.inf)).arguments)
    assert torch.equal(out, plain_out)
    assert torch.equal(lse, plain_lse)
    live = sum(problem.query_lens)
    out, lse = attention(*problem.with_rules(sinks=torch.full((heads,), torch.inf)).arguments)
    assert live > 0
    assert bool((out == 0).all())
    assert bool((lse[:live] == torch.inf).all())


@pytest.mark.parametrize("seed", range(700, 730))
def test_every_intermediate_is_defined_and_the_shares_add_up(seed: int) -> None:
    """What an error bound is made from: no NaN in it anywhere, invisible keys included."""
    problem = draw(seed)
    for part in attention_rows(*problem.arguments):
        for tensor in (part.rows.q, part.rows.k, part.rows.v, part.scores.x, part.scores.y, part.scores.bias, part.out):
            assert tensor is None or bool(tensor.isfinite().all())
        weights = part.weights
        shares = weights.p.sum(dim=-1) + weights.p_sink
        close(shares, (weights.lse > -torch.inf).double(), 1e-14)
        assert bool((weights.p >= 0).all())
        assert bool((weights.p.movedim(3, 1)[~part.rows.valid] == 0).all())


@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize("num_blocks", [0, 2])
def test_nobody_in_the_batch(num_tokens: int, num_blocks: int) -> None:
    batch = Batch(
        torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0, 0, dtype=torch.int32)
    )
    cache = torch.full((num_blocks, 4, 1, 8), float("nan"))
    q = torch.full((num_tokens, 2, 8), float("nan"))
    out, lse = attention(q, cache, cache, batch, Rules(softmax_scale=1.0, sinks=torch.ones(2)), validate=True)
    assert torch.equal(out, torch.zeros(num_tokens, 2, 8))
    assert torch.equal(lse, torch.full((num_tokens, 2), -torch.inf))


def test_requests_without_keys_need_no_page() -> None:
    batch = Batch(
        torch.tensor([0, 2, 2], dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, 0, dtype=torch.int32),
    )
    cache = torch.zeros(0, 4, 1, 8)
    out, lse = attention(torch.ones(2, 1, 8), cache, cache, batch, Rules(softmax_scale=1.0), validate=True)
    assert torch.equal(out, torch.zeros(2, 1, 8))
    assert torch.equal(lse, torch.full((2, 1), -torch.inf))
