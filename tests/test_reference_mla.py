"""The two meanings of MLA agree with each other, and each with ordinary attention over rows made by hand."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pageproof.reference import Scales, attention, mla_attention, mla_attention_decompressed

from .reference_cases import Problem, close, draw


@dataclass(frozen=True)
class Latent:
    """A `Problem` with one kv head (its query heads kept), read as MLA: D = rank + rope."""

    problem: Problem
    q_nope: Tensor
    q_pe: Tensor
    latent_cache: Tensor
    w_uk: Tensor
    w_uv: Tensor

    @property
    def absorbed_q(self) -> Tensor:
        return torch.einsum("thn,hnc->thc", self.q_nope, self.w_uk)


def draw_latent(seed: int) -> Latent:
    problem = draw(seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rank, rope, nope, head_size_v = rng.choice((1, 6, 16)), rng.choice((1, 4)), rng.choice((1, 5)), rng.choice((1, 7))
    tokens, heads = problem.q.shape[:2]
    hidden = problem.k_cache[:, :, 0, 0].isnan()
    cache = torch.randn(*hidden.shape, rank + rope + 2, generator=generator, dtype=torch.float64)
    cache[hidden] = float("nan")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q_nope, q_pe = normal(tokens, heads, nope), normal(tokens, heads, rope)
    for q in (q_nope, q_pe):
        q[problem.q[:, 0, 0].isnan()] = float("nan")
    return Latent(
        problem, q_nope, q_pe, cache[..., : rank + rope], normal(heads, nope, rank), normal(heads, head_size_v, rank)
    )


@pytest.mark.parametrize("seed", range(500, 540))
def test_absorbed_equals_decompressed(seed: int) -> None:
    case = draw_latent(seed)
    batch, rules = case.problem.batch, case.problem.rules
    latent, lse = mla_attention(case.absorbed_q, case.q_pe, case.latent_cache, batch, rules, validate=True)
    absorbed = torch.einsum("thc,hvc->thv", latent, case.w_uv)
    out, decompressed_lse = mla_attention_decompressed(
        case.q_nope, case.q_pe, case.latent_cache, case.w_uk, case.w_uv, batch, rules, validate=True
    )
    close(absorbed, out)
    close(lse, decompressed_lse)


@pytest.mark.parametrize("seed", range(540, 560))
def test_decompressed_is_attention_over_a_decompressed_cache(seed: int) -> None:
    case = draw_latent(seed)
    batch, rules, rank = case.problem.batch, case.problem.rules, case.w_uk.shape[2]
    c, k_pe = case.latent_cache[..., :rank], case.latent_cache[..., None, rank:]
    k_nope = (c[:, :, None, None, :] * case.w_uk).sum(dim=-1)
    k_cache = torch.cat((k_nope, k_pe.expand(-1, -1, k_nope.shape[2], -1)), dim=-1)
    v_cache = (c[:, :, None, None, :] * case.w_uv).sum(dim=-1)
    q = torch.cat((case.q_nope, case.q_pe), dim=-1)
    expected_out, expected_lse = attention(q, k_cache, v_cache, batch, rules)
    out, lse = mla_attention_decompressed(case.q_nope, case.q_pe, case.latent_cache, case.w_uk, case.w_uv, batch, rules)
    close(out, expected_out)
    close(lse, expected_lse)


def test_one_scale_serves_the_whole_float8_row() -> None:
    case = draw_latent(541)
    batch, rules = case.problem.batch, case.problem.rules
    q_nope, q_pe = case.absorbed_q, case.q_pe
    stored = case.latent_cache.to(torch.float8_e4m3fn)
    scales = Scales(q=torch.tensor([3.1]), k=torch.tensor(0.37))
    out, lse = mla_attention(
        q_nope.to(torch.float8_e4m3fn),
        q_pe.to(torch.float8_e4m3fn),
        stored,
        batch,
        rules,
        scales=scales,
        out=torch.empty_like(q_nope),
        lse=torch.empty(q_nope.shape[:2], dtype=torch.float64),
    )
    queries = [q.to(torch.float8_e4m3fn).double() * scales.q.double() for q in (q_nope, q_pe)]
    expected_out, expected_lse = mla_attention(*queries, stored.double() * scales.k.double(), batch, rules)
    assert int(out.count_nonzero()) > 0
    close(out, expected_out, 1e-14)
    close(lse, expected_lse, 1e-14)
