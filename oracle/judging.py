"""One case, one candidate, one verdict."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .adapters import target_of
from .bound.evaluate import Expected
from .bound.statistics import why_not_generic
from .bound.together import footprint
from .building.guards import difference
from .building.problem import Problem
from .building.tensors import build
from .candidate import Candidate, NumericContract, why_declined
from .case import MODES, Case
from .case_rules import why_invalid
from .checks import CandidateError, Session, ask
from .compare import Ratios, compare
from .diagnose import with_hints
from .execution.eager import run
from .questions import Question, Reply, ask_together
from .replays import Judgement, Replayed, run_replays
from .verdict import Outcome, Verdict, gravest

SHOWN_TRACEBACK_LINES = 12


def judge(case: Case, candidate: Candidate, device: torch.device | str = "cpu") -> Verdict:
    """Whether the candidate computes this case as the reference does, within the bound of its own arithmetic.

    The candidate runs before the expected answer exists, so no reused memory can hold it. What the candidate
    raises is a verdict (crashed); what the oracle itself raises is not caught. Raises ValueError on a case that
    means nothing.
    """
    begun = begin(case, candidate, device)
    return begun if isinstance(begun, Verdict) else finish(begun)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A plain call of a case, before anything is asked of what came of it."""

    candidate: Candidate
    contract: NumericContract
    problem: Problem
    actual: dict[str, Tensor]  # the outputs by name

    @property
    def bytes(self) -> int:
        """What it takes in memory, and its evaluation will, roughly."""
        return footprint(self.problem)

    def kept(self) -> Run:
        """The same with copies of the outputs: the next call of the candidate may write to these once more."""
        return replace(self, actual={name: tensor.clone() for name, tensor in self.actual.items()})

    def questions(self) -> list[Question]:
        """To be asked only where its guards hold: what has changed may be what the answer would be made of."""
        generic = why_not_generic(self.problem.case, self.contract) is None
        return [Question(problem=self.problem, contract=self.contract, actual=self.actual, generic=generic)]

    def difference(self) -> Tensor | None:
        """[] bool on the device: whether the candidate has changed what is not its own. None: nothing is watched."""
        pairs = self.problem.guards.pairs()
        return difference(pairs) if pairs else None

    def violation(self) -> Verdict | None:
        """What the candidate has done to what is not its own, if anything."""
        try:
            words = self.problem.guards.violations()
        except torch.OutOfMemoryError:
            raise  # this request was the oracle's own
        except Exception as error:  # a fault of the device that shows only now
            return self._verdict(Outcome.CRASHED, reason=_last_lines(error))
        return self._verdict(Outcome.OUT_OF_BOUNDS, reason=words) if words else None

    def verdict(self, replies: Sequence[Reply]) -> Verdict:
        """Given the reply to its question; and what else the case is asked."""
        (reply,) = replies
        if reply.ratios is not None:
            return self._asked_more(reply.expected, reply.ratios)
        mismatches, ratios = compare(self.actual, reply.expected, self.problem)
        if not mismatches:
            return self._asked_more(reply.expected, ratios)
        mismatches = with_hints(self.problem, self.actual, reply.expected, mismatches)
        check = mismatches[0].check
        return self._verdict(gravest(mismatches), check=check, mismatches=mismatches, ratios=ratios)

    def _asked_more(self, expected: Expected, ratios: Ratios) -> Verdict:
        """Of outputs that are right: what the check that the case names has to say."""
        case = self.problem.case
        try:
            finding = ask(Session(self.candidate, self.contract, self.problem, self.actual, expected))
        except CandidateError as error:
            return _crashed_again(case, self.candidate, error, check=case.check)
        if finding is not None:
            return self._verdict(finding.outcome, check=case.check, reason=finding.reason, ratios=ratios)
        return self._verdict(Outcome.AGREES, ratios=ratios)

    def _verdict(self, outcome: Outcome, **rest: Any) -> Verdict:
        return _of(self.problem.case, self.candidate)(outcome=outcome, **rest)


@dataclass(frozen=True, kw_only=True)
class ReplayRun:
    """The same of a case in a mode other than eager: every step of it ran."""

    candidate: Candidate
    case: Case
    replayed: Replayed

    @property
    def bytes(self) -> int:
        return self.replayed.bytes

    def difference(self) -> Tensor | None:
        return self.replayed.difference()

    def violation(self) -> Verdict | None:
        return self._said(self.replayed.violation)

    def questions(self) -> list[Question]:
        return self.replayed.questions()

    def verdict(self, replies: Sequence[Reply]) -> Verdict:
        verdict = self._said(partial(self.replayed.judgement, replies))
        assert verdict is not None
        return verdict

    def _said(self, ask: Callable[[], Judgement | None]) -> Verdict | None:
        try:
            judgement = ask()
        except CandidateError as error:
            return _crashed_again(self.case, self.candidate, error)
        return None if judgement is None else _of(self.case, self.candidate)(**vars(judgement))


def begin(case: Case, candidate: Candidate, device: torch.device | str) -> Run | ReplayRun | Verdict:
    """Build the case and let the candidate run it. A verdict: there is nothing to ask the reference."""
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
            replayed = run_replays(case, candidate, contract, torch.device(device))
        except CandidateError as error:
            return _crashed_again(case, candidate, error)
        if isinstance(replayed, Replayed):
            return ReplayRun(candidate=candidate, case=case, replayed=replayed)
        return verdict(**vars(replayed))
    problem = build(case, torch.device(device))
    try:
        actual = run(candidate, problem)
    except Exception as error:
        return verdict(outcome=Outcome.CRASHED, reason=_last_lines(error))
    return Run(candidate=candidate, contract=contract, problem=problem, actual=actual)


def finish(begun: Run | ReplayRun) -> Verdict:
    """Ask the reference about this case alone."""
    if (violation := begun.violation()) is not None:
        return violation
    return begun.verdict(ask_together(begun.questions()))


def _crashed_again(case: Case, candidate: Candidate, error: CandidateError, check: str = "") -> Verdict:
    """Raised by the candidate in one of several runs; the cause is what it raised."""
    reason = _last_lines(error.__cause__ or error)
    return _of(case, candidate)(outcome=Outcome.CRASHED, check=check, reason=reason)


def _of(case: Case, candidate: Candidate) -> Callable[..., Verdict]:
    return partial(Verdict, case=case, candidate=candidate.name, target=target_of(candidate))


def _last_lines(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(lines[-SHOWN_TRACEBACK_LINES:])
