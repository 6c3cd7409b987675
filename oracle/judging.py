"""One case, one candidate, one verdict."""

from __future__ import annotations

import traceback
from functools import partial

import torch

from .adapters import target_of
from .bound.evaluate import evaluate
from .building.tensors import build
from .candidate import Candidate, NumericContract, why_declined
from .case import MODES, Case
from .case_rules import why_invalid
from .checks import CandidateError, Session, ask
from .compare import compare
from .diagnose import with_hints
from .execution.eager import run
from .replays import judge_replays
from .verdict import Outcome, Verdict, gravest

SHOWN_TRACEBACK_LINES = 12


def judge(case: Case, candidate: Candidate, device: torch.device | str = "cpu") -> Verdict:
    """Whether the candidate computes this case as the reference does, within the bound of its own arithmetic.

    The candidate runs before the expected answer exists, so no reused memory can hold it. What the candidate
    raises is a verdict (crashed); what the oracle itself raises is not caught. Raises ValueError on a case that
    means nothing.
    """
    verdict = partial(Verdict, case=case, candidate=candidate.name, target=target_of(candidate))
    if (reason := why_invalid(case)) is not None:
        raise ValueError(f"case: {reason}")
    try:
        if (reason := why_declined(candidate, case)) is not None:
            return verdict(outcome=Outcome.DECLINED, reason=reason)
        contract = candidate.contract(case)
        if not isinstance(contract, NumericContract):
            raise TypeError(f"contract: found {type(contract).__name__}, expected a NumericContract")
    except Exception as error:
        return verdict(outcome=Outcome.CRASHED, reason=_last_lines(error))
    if case.mode != MODES[0]:
        try:
            judgement = judge_replays(case, candidate, contract, torch.device(device))
        except CandidateError as error:
            return verdict(outcome=Outcome.CRASHED, reason=_last_lines(error.__cause__ or error))
        return verdict(**vars(judgement))
    problem = build(case, torch.device(device))
    try:
        actual = run(candidate, problem)
    except Exception as error:
        return verdict(outcome=Outcome.CRASHED, reason=_last_lines(error))
    try:
        violation = problem.guards.violations()
    except torch.OutOfMemoryError:
        raise  # this request was the oracle's own
    except Exception as error:  # a fault of the device that shows only now
        return verdict(outcome=Outcome.CRASHED, reason=_last_lines(error))
    if violation:  # what has changed may be what the answer would be made of
        return verdict(outcome=Outcome.OUT_OF_BOUNDS, reason=violation)
    expected = evaluate(problem, contract)
    mismatches, ratios = compare(actual, expected, problem)
    if mismatches:
        mismatches = with_hints(problem, actual, expected, mismatches)
        return verdict(outcome=gravest(mismatches), check=mismatches[0].check, mismatches=mismatches, ratios=ratios)
    try:
        finding = ask(Session(candidate, contract, problem, actual, expected))
    except CandidateError as error:
        return verdict(outcome=Outcome.CRASHED, check=case.check, reason=_last_lines(error.__cause__ or error))
    if finding is not None:
        return verdict(outcome=finding.outcome, check=case.check, reason=finding.reason, ratios=ratios)
    return verdict(outcome=Outcome.AGREES, ratios=ratios)


def _last_lines(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(lines[-SHOWN_TRACEBACK_LINES:])
