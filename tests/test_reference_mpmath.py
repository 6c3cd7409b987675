"""The reference agrees with the contract's table read literally: three nested loops in 60 digits."""

from __future__ import annotations

import random

import mpmath
import pytest
import torch

from pageproof.reference import attention

from .reference_cases import Problem, close, draw

mpmath.mp.dps = 60


def literal_row(problem: Problem, request: int, token: int, position: int, head: int) -> tuple[list[float], float]:
    """One head of one token: (out, lse)."""
    rules = problem.rules
    kv_head = head // problem.group_size
    logits, values = [], []
    for j in problem.sees(request, token, position):
        block, offset = problem.slot(request, j)
        score = mpmath.mpf(0)
        for d in range(problem.q.shape[2]):
            score += mpmath.mpf(float(problem.q[token, head, d])) * mpmath.mpf(
                float(problem.k_cache[block, offset, kv_head, d])
            )
        score *= mpmath.mpf(rules.softmax_scale)
        if rules.softcap is not None:
            score = rules.softcap * mpmath.tanh(score / rules.softcap)
        if rules.alibi_slopes is not None:
            score += mpmath.mpf(float(rules.alibi_slopes[head])) * (j - position)
        score += mpmath.mpf(problem.bias_entry(request, token, j))
        logits.append(score)
        values.append([mpmath.mpf(float(x)) for x in problem.v_cache[block, offset, kv_head]])
    sink = mpmath.mpf("-inf") if rules.sinks is None else mpmath.mpf(float(rules.sinks[head]))
    head_size_v = problem.v_cache.shape[3]
    if sink == mpmath.inf:
        return [0.0] * head_size_v, float("inf")
    total = mpmath.exp(sink) + sum(mpmath.exp(score) for score in logits)
    if total == 0:
        return [0.0] * head_size_v, float("-inf")
    out = []
    for d in range(head_size_v):
        weighted = sum(mpmath.exp(score) * value[d] for score, value in zip(logits, values, strict=True))
        out.append(float(weighted / total))
    return out, float(mpmath.log(total))


@pytest.mark.parametrize("seed", range(40))
def test_spot_rows_equal_the_literal_reading(seed: int) -> None:
    problem = draw(seed)
    out, lse = attention(*problem.arguments, validate=True)
    rng = random.Random(seed)
    rows = list(problem.rows())
    for request, token, position in rng.sample(rows, min(4, len(rows))):
        head = rng.randrange(problem.q.shape[1])
        expected_out, expected_lse = literal_row(problem, request, token, position, head)
        close(out[token, head], torch.tensor(expected_out, dtype=torch.float64), 1e-13)
        close(lse[token, head], torch.tensor(expected_lse, dtype=torch.float64), 1e-13)


def test_rows_of_no_request_are_zero_and_minus_infinity() -> None:
    checked = 0
    for seed in range(40):
        problem = draw(seed)
        out, lse = attention(*problem.arguments)
        live = sum(problem.query_lens)
        checked += problem.q.shape[0] - live
        assert bool((out[live:] == 0).all())
        assert bool((lse[live:] == float("-inf")).all())
    assert checked > 10
