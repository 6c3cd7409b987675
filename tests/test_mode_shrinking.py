"""A finding in mode full_and_piecewise shrinks there, and becomes a plain call where one fails alike."""

from __future__ import annotations

from typing import Any

import torch

from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.case import MODES
from pageproof.oracle.shrinking import Search, shrink, symptom_of

from .graph_backends import is_capturing

CASE = Case(
    spec=Spec(operation="merge_states", dtype="float16"),
    batch=BatchShape(query_lens=(1, 1, 4, 1, 1), seq_lens=(9, 4, 17, 3, 1), padding_tokens=2),
    recipe="cancel",
    mode="full_and_piecewise",
    seed=5,
)


class Merging(Reference):
    """The reference's merge, which reads nothing on the host."""

    modes = MODES

    def declines(self, case: Case) -> str | None:
        return None if case.spec.operation == "merge_states" else "merges only"


class HalvedInGraphs(Merging):
    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        out, lse = super().call(operation, arguments)
        return (out * 0.5, lse) if is_capturing() else (out, lse)


class Halved(Merging):
    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        out, lse = super().call(operation, arguments)
        return torch.where(lse[..., None] > 0, out * 0.5, out), lse


def shrunk_against(candidate: Merging) -> Search:
    symptom = symptom_of(judge(CASE, candidate))
    search = shrink(CASE, lambda trial: symptom_of(judge(trial, candidate)) == symptom, seconds=240)
    assert search.finished
    assert search.reproduced
    assert symptom_of(judge(Case.from_json(search.best.to_json()), candidate)) == symptom
    return search


def test_the_healthy_one_agrees() -> None:
    for mode in MODES:
        case = Case(spec=CASE.spec, batch=CASE.batch, mode=mode, seed=5)
        assert judge(case, Merging()).outcome is Outcome.AGREES


def test_what_only_a_graph_does_stays_in_the_mode_and_takes_one_replay() -> None:
    best = shrunk_against(HalvedInGraphs()).best
    assert (best.mode, best.replays, best.recipe) == ("full_and_piecewise", 1, "normal")
    assert best.batch == BatchShape()


def test_what_a_plain_call_does_as_well_becomes_one() -> None:
    best = shrunk_against(Halved()).best
    assert (best.mode, best.recipe) == ("eager", "normal")
    assert best.batch.num_tokens == 1
