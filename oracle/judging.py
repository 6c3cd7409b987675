"""One case, one candidate, one verdict."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .adapters import target_of
from .bound.evaluate import Expected, evaluate
from .building.problem import Problem
from .building.tensors import build
from .candidate import Candidate, NumericContract, why_declined
from .case import MODES, Case
from .case_rules import why_invalid
from .checks import CandidateError, Session, ask
from .compare import Ratios, compare
from .diagnose import with_hints
from .execution.eager import run
from .replays import judge_replays
from .verdict import Outcome, Verdict, gravest

SHOWN_TRACEBACK_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Run:
    """A case that the candidate has run, before anything is asked of what came of it."""

    candidate: Candidate
    contract: NumericContract
    problem: Problem
    actual: dict[str, Tensor]  # the outputs by name, in the memory the candidate wrote them to

    def verdict(self, outcome: Outcome, **rest: Any) -> Verdict:
        return _of(self.problem.case, self.candidate)(outcome=outcome, **rest)


def judge(case: Case, candidate: Candidate, device: torch.device | str = "cpu") -> Verdict:
    """Whether the candidate computes this case as the reference does, within the bound of its own arithmetic.

    The candidate runs before the expected answer exists, so no reused memory can hold it. What the candidate
    raises is a verdict (crashed); what the oracle itself raises is not caught. Raises ValueError on a case that
    means nothing.
    """
    begun = begin(case, candidate, device)
    return finish(begun) if isinstance(begun, Run) else begun


def begin(case: Case, candidate: Candidate, device: torch.device | str) -> Run | Verdict:
    """Build the case and let the candidate run it. A verdict: there is nothing to compare, or that is done already."""
    verdict = _of(case, candidate)
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
    return Run(candidate=candidate, contract=contract, problem=problem, actual=actual)


def finish(begun: Run) -> Verdict:
    """Compare what the candidate has left with what is right, and ask what else the case is asked."""
    problem = begun.problem
    try:
        violation = problem.guards.violations()
    except torch.OutOfMemoryError:
        raise  # this request was the oracle's own
    except Exception as error:  # a fault of the device that shows only now
        return begun.verdict(Outcome.CRASHED, reason=_last_lines(error))
    if violation:  # what has changed may be what the answer would be made of
        return begun.verdict(Outcome.OUT_OF_BOUNDS, reason=violation)
    expected = evaluate(problem, begun.contract)
    mismatches, ratios = compare(begun.actual, expected, problem)
    if mismatches:
        mismatches = with_hints(problem, begun.actual, expected, mismatches)
        check = mismatches[0].check
        return begun.verdict(gravest(mismatches), check=check, mismatches=mismatches, ratios=ratios)
    return ask_more(begun, expected, ratios)


def ask_more(begun: Run, expected: Expected, ratios: Ratios) -> Verdict:
    """Of a case whose outputs are right: what the check that it names has to say."""
    case = begun.problem.case
    try:
        finding = ask(Session(begun.candidate, begun.contract, begun.problem, begun.actual, expected))
    except CandidateError as error:
        return begun.verdict(Outcome.CRASHED, check=case.check, reason=_last_lines(error.__cause__ or error))
    if finding is not None:
        return begun.verdict(finding.outcome, check=case.check, reason=finding.reason, ratios=ratios)
    return begun.verdict(Outcome.AGREES, ratios=ratios)


def _of(case: Case, candidate: Candidate) -> Callable[..., Verdict]:
    return partial(Verdict, case=case, candidate=candidate.name, target=target_of(candidate))


def _last_lines(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(lines[-SHOWN_TRACEBACK_LINES:])
