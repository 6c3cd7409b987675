"""The reference agrees to 1e-12 in float64 with formulations of the same meaning that share no code with it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from pageproof.reference import attention, merge_states

from .reference_cases import Problem, close, draw


class OnlineState:
    """Running maximum, sum and accumulator of one row, all heads; keys may come in any order."""

    def __init__(self, num_heads: int, head_size_v: int) -> None:
        self.maximum = torch.full((num_heads,), -torch.inf, dtype=torch.float64)
        self.total = torch.zeros(num_heads, dtype=torch.float64)
        self.out = torch.zeros(num_heads, head_size_v, dtype=torch.float64)

    def add(self, score: Tensor, value: Tensor) -> None:
        maximum = torch.maximum(self.maximum, score)
        kept = torch.where(self.maximum == -torch.inf, 0.0, torch.exp(self.maximum - maximum))
        weight = torch.where(score == -torch.inf, 0.0, torch.exp(score - maximum))
        self.maximum = maximum
        self.total = self.total * kept + weight
        self.out = self.out * kept[:, None] + weight[:, None] * value

    def finish(self) -> tuple[Tensor, Tensor]:
        some = self.total > 0
        out = torch.where(some[:, None], self.out / self.total[:, None], 0.0)
        return out, torch.where(some, self.maximum + self.total.log(), -torch.inf)


def key_score(problem: Problem, request: int, token: int, position: int, j: int) -> tuple[Tensor, Tensor]:
    """Scores of all heads of a token at one key, and the key's value for every query head."""
    block, offset = problem.slot(request, j)
    k = problem.k_cache[block, offset].repeat_interleave(problem.group_size, dim=0)
    v = problem.v_cache[block, offset].repeat_interleave(problem.group_size, dim=0)
    rules = problem.rules
    score = (problem.q[token] * k).sum(dim=-1) * rules.softmax_scale
    if rules.softcap is not None:
        score = torch.tanh(score / rules.softcap) * rules.softcap
    if rules.alibi_slopes is not None:
        score = score + rules.alibi_slopes.double() * (j - position)
    return score + problem.bias_entry(request, token, j), v


def online(problem: Problem, row: tuple[int, int, int], keys: list[int], *, with_sink: bool) -> tuple[Tensor, Tensor]:
    state = OnlineState(problem.q.shape[1], problem.v_cache.shape[3])
    for j in keys:
        state.add(*key_score(problem, *row, j))
    if with_sink and problem.rules.sinks is not None:
        state.add(problem.rules.sinks.double(), torch.zeros_like(state.out))
    return state.finish()


def without_infinite_sinks(problem: Problem) -> Problem:
    """The online softmax above cannot subtract +inf."""
    sinks = problem.rules.sinks
    return problem if sinks is None else problem.with_rules(sinks=sinks.clamp(max=4.0))


@pytest.mark.parametrize("seed", range(100, 130))
def test_online_softmax_in_any_key_order(seed: int) -> None:
    problem = without_infinite_sinks(draw(seed))
    out, lse = attention(*problem.arguments)
    rng = random.Random(seed)
    for row in problem.rows():
        keys = problem.sees(*row)
        rng.shuffle(keys)
        expected_out, expected_lse = online(problem, row, keys, with_sink=True)
        close(out[row[1]], expected_out)
        close(lse[row[1]], expected_lse)


@pytest.mark.parametrize("seed", range(200, 230))
def test_splits_merged_by_lse(seed: int) -> None:
    problem = without_infinite_sinks(draw(seed))
    out, lse = attention(*problem.arguments)
    rng = random.Random(seed)
    for row in problem.rows():
        keys = problem.sees(*row)
        splits = rng.choice((2, 3, 5))
        parts = [online(problem, row, keys[index::splits], with_sink=index == splits // 2) for index in range(splits)]
        merged = parts[0]
        for part in parts[1:]:
            merged = tuple(item[0] for item in merge_states(*(x[None] for x in (*merged, *part))))
        close(out[row[1]], merged[0])
        close(lse[row[1]], merged[1])


def flex(problem: Problem, request: int) -> tuple[Tensor, Tensor]:
    """One request through flex_attention, the sink applied afterwards by its share."""
    q, k, v = problem.dense(request)
    rules, context = problem.rules, problem.seq_lens[request] - problem.query_lens[request]
    first_token = sum(problem.query_lens[:request])
    bias = torch.zeros(q.shape[0], k.shape[0], dtype=torch.float64)
    for t in range(q.shape[0]):
        for j in range(k.shape[0]):
            bias[t, j] = problem.bias_entry(request, first_token + t, j)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        distance = context + t - j
        if rules.softcap is not None:
            score = rules.softcap * torch.tanh(score / rules.softcap)
        if rules.alibi_slopes is not None:
            score = score - rules.alibi_slopes[h].double() * distance
        score = score + bias[t, j]
        if rules.causal:
            score = torch.where(distance < 0, -torch.inf, score)
        if rules.sliding_window is not None:
            score = torch.where(distance > rules.sliding_window - 1, -torch.inf, score)
        if rules.right_window is not None:
            score = torch.where(-distance > rules.right_window, -torch.inf, score)
        return score

    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out, aux = flex_attention(
        *heads_first, score_mod=score_mod, scale=rules.softmax_scale, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    out, lse = out[0].transpose(0, 1), aux.lse[0].transpose(0, 1)
    if rules.sinks is None:
        return out, lse
    sinks = rules.sinks.double()
    return out * torch.sigmoid(lse - sinks).nan_to_num(0.0)[..., None], torch.logaddexp(lse, sinks.expand_as(lse))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("seed", range(300, 324))
def test_flex_attention_in_eager_mode(seed: int) -> None:
    problem = draw(seed)
    out, lse = attention(*problem.arguments)
    for request, (query_len, seq_len) in enumerate(zip(problem.query_lens, problem.seq_lens, strict=True)):
        if query_len and seq_len:
            start = sum(problem.query_lens[:request])
            expected_out, expected_lse = flex(problem, request)
            close(out[start : start + query_len], expected_out)
            close(lse[start : start + query_len], expected_lse)
