"""Which finding is shrunk when, by whom, and for how long; the judging is done by the campaign's workers."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..shrinking import Search
from ..verdict import Verdict
from .findings import Failure, Finding, Findings, Stage
from .messages import Trial

TRIAL_SECONDS = 20.0  # a smaller case that takes longer counts as timed out: a hang is shrunk at this price a step
BUSY_SHARE = 4  # while cases are still drawn, one worker in so many shrinks


@dataclass
class _Job:
    finding: Finding
    search: Search
    smallest: Failure
    asked: bool = False  # a worker is at its trial


class Shrinker:
    """The searches of a campaign. A trial that kills its worker is answered like any other, by whoever saw it die."""

    def __init__(self, findings: Findings, seconds: float) -> None:
        """`seconds` of wall clock after the last case was drawn; with 0 nothing is shrunk at all."""
        self.findings, self.seconds = findings, seconds
        self.until: float | None = None  # None as long as cases are drawn
        self.trials = 0
        self._jobs: dict[int, _Job] = {}
        self._taken_up = 0

    def all_are_drawn(self) -> None:
        """From now on the time for shrinking runs; nothing happens when this is said again."""
        if self.until is None:
            self.until = time.monotonic() + self.seconds

    @property
    def over(self) -> bool:
        """Whether there is nothing to shrink, or no time."""
        if not self.seconds or (self.until is not None and time.monotonic() >= self.until):
            return True
        return not self._jobs and self.findings.all_taken_up

    def next_trial(self, workers: int) -> Trial | None:
        """A case to judge now, for one of so many workers; None if all that may be asked has been."""
        if self.over:
            return None
        for number, job in self._jobs.items():
            if not job.asked and job.search.trial is not None:
                job.asked = True
                return Trial(number=number, case=job.search.trial)
        at_most = workers if self.until is not None else (max(1, workers // BUSY_SHARE) if workers > 1 else 0)
        if len(self._jobs) >= at_most:
            return None
        return self._take_up()

    def _take_up(self) -> Trial | None:
        finding = self.findings.next_to_shrink()
        if finding is None:
            return None
        finding.stage = Stage.TAKEN_UP
        job = _Job(finding, Search(finding.failure.case), finding.failure, asked=True)
        self._taken_up += 1
        self._jobs[self._taken_up] = job
        return Trial(number=self._taken_up, case=finding.failure.case)

    def tell(self, trial: Trial, verdict: Verdict) -> None:
        """What became of a trial."""
        job = self._jobs[trial.number]
        job.asked = False
        self.trials += 1
        failure = Failure.of(verdict)
        fails = failure.symptom == job.finding.failure.symptom
        if fails:
            job.smallest = failure
        job.search.tell(fails)
        if job.search.trial is None:
            self._finish(trial.number)

    def ask_again(self, trial: Trial) -> None:
        """Nothing is known of a trial whose worker ended before it began."""
        self._jobs[trial.number].asked = False

    def close(self) -> None:
        """No more time: what is under way stays as small as it is by now."""
        for number in list(self._jobs):
            self._finish(number)
        if self.trials:
            self.findings.conclude()

    def _finish(self, number: int) -> None:
        job = self._jobs.pop(number)
        self.findings.shrunk(job.finding, job.smallest, stage_of(job.search))


def stage_of(search: Search) -> Stage:
    """How far a search has come."""
    if search.reproduced:
        return Stage.SHRUNK if search.finished else Stage.PARTLY
    return Stage.UNSTEADY if search.finished else Stage.FOUND
