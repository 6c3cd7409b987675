"""One case, one candidate, one verdict."""

from __future__ import annotations

import traceback

import torch

from .bound.evaluate import evaluate
from .building.tensors import build
from .candidate import Candidate
from .case import Case
from .compare import compare
from .execution.eager import run
from .verdict import Mismatch, Outcome, Verdict

SHOWN_TRACEBACK_LINES = 12


def judge(case: Case, candidate: Candidate, device: torch.device | str = "cpu") -> Verdict:
    """Whether the candidate computes this case as the reference does, within the bound of its own arithmetic.

    The candidate runs before the expected answer exists, so no reused memory can hold it. What the candidate
    raises is a verdict (crashed); what the oracle itself raises is not caught.
    """
    if (reason := candidate.declines(case)) is not None:
        return Verdict(outcome=Outcome.DECLINED, case=case, candidate=candidate.name, reason=reason)
    problem = build(case, torch.device(device))
    try:
        actual = run(candidate, problem)
        violation = problem.guards.violations()
    except Exception as error:
        return Verdict(outcome=Outcome.CRASHED, case=case, candidate=candidate.name, reason=_last_lines(error))
    if violation:  # what has changed may be what the answer would be made of
        return Verdict(outcome=Outcome.OUT_OF_BOUNDS, case=case, candidate=candidate.name, reason=violation)
    expected = evaluate(problem, candidate.contract(case))
    mismatches, ratios = compare(actual, expected, problem)
    outcome = _gravest(mismatches)
    return Verdict(outcome=outcome, case=case, candidate=candidate.name, mismatches=mismatches, ratios=ratios)


def _gravest(mismatches: tuple[Mismatch, ...]) -> Outcome:
    """The one word for several outputs: what was never written says most about its cause."""
    found = {mismatch.outcome for mismatch in mismatches}
    for outcome in (Outcome.UNWRITTEN, Outcome.POISONED, Outcome.DIFFERS):
        if outcome in found:
            return outcome
    return Outcome.AGREES


def _last_lines(error: Exception) -> str:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(lines[-SHOWN_TRACEBACK_LINES:])
