"""The order of steps, and what is kept between them: the smallest case so far and every answer."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..case import Case
from ..case_rules import why_invalid
from .batches import smaller
from .features import plainer
from .reducing import Trials

EVALUATIONS = 500


class Search:
    """One case being made smaller; asks for one judgement at a time, so it outlives whoever judges.

    The same answers give the same questions. A case that means nothing is not asked about, nor any case twice.
    """

    def __init__(self, case: Case, evaluations: int = EVALUATIONS) -> None:
        self.best = case  # the last case that failed with the symptom
        self.evaluations = 0
        self.limit = evaluations
        self._answers: dict[Case, bool] = {}
        self._trials = _rounds(case)
        self._trial: Case | None = next(self._trials)

    @property
    def trial(self) -> Case | None:
        """The case to judge next; None where the search is over or may ask no more."""
        return self._trial if self.evaluations < self.limit else None

    @property
    def finished(self) -> bool:
        """Whether no step makes the case any smaller."""
        return self._trial is None

    @property
    def reproduced(self) -> bool:
        """Whether the case failed again when it was first tried."""
        return next(iter(self._answers.values()), False)

    def tell(self, fails: bool) -> None:
        """Whether the trial fails with the symptom of the first case."""
        if self._trial is None:
            raise ValueError("trial: found a search that is over, expected one that has asked")
        self.evaluations += 1
        self._answers[self._trial] = fails
        if fails:
            self.best = self._trial
        self._go_on(fails)
        while self._trial is not None and (known := self._known(self._trial)) is not None:
            self._go_on(known)

    def _known(self, trial: Case) -> bool | None:
        return False if why_invalid(trial) is not None else self._answers.get(trial)

    def _go_on(self, fails: bool) -> None:
        try:
            self._trial = self._trials.send(fails)
        except StopIteration:
            self._trial = None


def _rounds(case: Case) -> Trials[None]:
    """Does it fail again? Then inside its compile key, then with fewer features, until neither changes anything."""
    if not (yield case):
        return
    before = None
    while case != before:
        before = case
        case = yield from smaller(case)
        case = yield from plainer(case)


def shrink(
    case: Case, still_fails: Callable[[Case], bool], *, evaluations: int = EVALUATIONS, seconds: float = 60.0
) -> Search:
    """Drive a search in this process to its end, or until either budget is used up: see `.best`, `.finished`."""
    search, until = Search(case, evaluations), time.monotonic() + seconds
    while search.trial is not None and time.monotonic() < until:
        search.tell(still_fails(search.trial))
    return search
