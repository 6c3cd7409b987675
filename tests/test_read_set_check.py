"""The read set as a check of a case: what it adds to the answer, when it declines, how often a campaign asks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pageproof.optimized.interpreter import INTERPRETED
from pageproof.oracle import BatchShape, Case, Spec
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.building.tensors import build
from pageproof.oracle.campaign import lengths
from pageproof.oracle.campaign.pairs import Model
from pageproof.oracle.campaign.sampler import random_group
from pageproof.oracle.case import MODES
from pageproof.oracle.checks import CandidateError
from pageproof.oracle.checks.reads import NOTHING_RAN, wrong_accesses
from pageproof.oracle.execution.tracing import NEEDS_INTERPRETER, why_untraceable
from pageproof.oracle.judging import judge
from pageproof.oracle.mutants.catalogue import Mutant
from pageproof.oracle.mutants.loading import load
from pageproof.oracle.verdict import Outcome

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here, not interpreted")

CASE = Case(
    spec=Spec(dtype="float32", head_size=16, head_size_v=16, sliding_window=5),
    batch=BatchShape(query_lens=(1, 4), seq_lens=(37, 9), padding_tokens=2),
    check="reads",
)
READS_A_KEY_TOO_MANY = Mutant(
    name="reads_too_many",
    file="kernels/tiles.py",
    old="start = tl.maximum(tile.first_position - numbers.sliding_window + 1, 0)",
    new="start = tl.maximum(tile.first_position - numbers.sliding_window, 0)",
    story="one key left of the window is read, and weighs nothing",
)


def test_it_finds_what_the_answer_does_not_show() -> None:
    case = replace(CASE, poison="")
    kernel = Ours(load(READS_A_KEY_TOO_MANY))
    assert judge(replace(case, check="answer"), kernel).outcome is Outcome.AGREES
    verdict = judge(case, kernel)
    assert (verdict.outcome, verdict.check, verdict.failed) == (Outcome.WRONG_ACCESS, "reads", True)
    assert verdict.reason.startswith(
        "k_cache: reads slot 0 of page 4 (key 0 of request 1), which no row may see (2 such slots); v"
    )


def test_a_kernel_that_touches_what_it_should_agrees() -> None:
    assert judge(CASE, Ours()).outcome is Outcome.AGREES


class Raising(Ours):
    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        super().call(operation, arguments)
        raise RuntimeError("later")


def test_what_the_candidate_raises_is_not_taken_for_an_access() -> None:
    with pytest.raises(CandidateError) as caught:
        wrong_accesses(Raising(), build(CASE))
    assert str(caught.value.__cause__) == "later"


def test_without_interpreted_kernels_there_is_nothing_to_say() -> None:
    verdict = judge(CASE, Reference())
    assert (verdict.outcome, verdict.reason) == (Outcome.DECLINED, f"reads: {NOTHING_RAN}")


def test_compiled_kernels_are_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    verdict = judge(CASE, Reference())
    reason = "reads: needs the interpreter (TRITON_INTERPRET=1, --device cpu)"
    assert (verdict.outcome, verdict.reason) == (Outcome.DECLINED, reason)
    assert why_untraceable(torch.device("cuda")) == NEEDS_INTERPRETER


def test_a_campaign_on_a_cpu_draws_it_now_and_then() -> None:
    plain = Model(banned=frozenset(("mode", mode) for mode in MODES[1:]))

    def share(sizes: lengths.Sizes) -> float:
        groups = [random_group(5, index, sizes) for index in range(300)]
        cases = [case for group in groups for case in replace(group, count=1).cases(plain, sizes)]
        return sum(case.check == "reads" for case in cases) / len(cases)

    assert 0.05 < share(lengths.INTERPRETED) < 0.2
    assert share(lengths.COMPILED) == 0.0
