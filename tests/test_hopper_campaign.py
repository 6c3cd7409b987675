"""Campaigns on a GPU draw cases for the kernels for Hopper often enough, by the choice itself, which needs no GPU."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from pageproof import optimized
from pageproof.optimized import hopper, hopper_mla, hopper_prefill
from pageproof.optimized.kernels.arguments import PagedKV, Queries, Step
from pageproof.optimized.launch import StepArguments
from pageproof.optimized.shapes import Shape
from pageproof.optimized.tuning import GPU_LIMITS
from pageproof.oracle import BatchShape, Case
from pageproof.oracle.building.tensors import build
from pageproof.oracle.campaign.lengths import COMPILED
from pageproof.oracle.campaign.pairs import Model
from pageproof.oracle.campaign.sampler import random_group
from pageproof.oracle.case import ATTENTION_OPERATIONS

KEYS = 400  # compile keys that are drawn


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Of each call, which is not launched: whether the prefill, and the MLA decode, for Hopper would take it."""
    found: list[tuple[bool, bool]] = []

    def choose(queries: Queries, cache: PagedKV, shape: Shape, arguments: StepArguments) -> None:
        _, rules, scales, outputs, work, _, _ = arguments
        step = Step(queries, cache, arguments.requests, rules, scales, outputs, work)
        found.append((hopper_prefill.why_portable(shape, step) is None, hopper_mla.why_portable(shape, step) is None))

    monkeypatch.setattr(hopper, "why_not_compiled", lambda _architecture: None)
    for module in ("attention", "mla"):  # the package has functions of these names
        monkeypatch.setattr(sys.modules[f"{optimized.__name__}.{module}"], "launch_step", choose)
    return found


def attention_cases() -> list[Case]:
    one = replace(COMPILED, cases_per_key=1)
    drawn = (case for index in range(KEYS) for case in random_group(3, index, one).cases(Model(extra=True), one))
    return [case for case in drawn if case.spec.operation in ATTENTION_OPERATIONS]


def taken(case: Case, choices: list[tuple[bool, bool]], device: torch.device) -> tuple[bool, bool]:
    """Whether the case runs the kernels (prefill, MLA decode) for Hopper; asked of a small batch, as none matters."""
    choices.clear()
    small = replace(case, batch=BatchShape(query_lens=(1,), seq_lens=(1,))).with_spec(far_pages=False)
    getattr(optimized, case.spec.operation)(**build(small, device).arguments)
    prefill, mla = choices[0]
    lens, few = case.batch.query_lens, GPU_LIMITS.decode_tokens
    return prefill and any(n > few for n in lens), mla and any(0 < n <= few for n in lens)


def test_a_gpu_campaign_draws_cases_for_both(choices: list[tuple[bool, bool]], pageproof_device: torch.device) -> None:
    cases = attention_cases()
    each = [taken(case, choices, pageproof_device) for case in cases]
    by_prefill, by_mla = (sum(column) / len(cases) for column in zip(*each, strict=True))
    assert 0.07 < by_prefill < 0.2
    assert 0.03 < by_mla < 0.1
