"""A campaign's side of workers that die."""

from __future__ import annotations

from pathlib import Path

from pageproof.oracle.campaign import Options, Summary
from pageproof.oracle.campaign.controller import Controller
from pageproof.oracle.campaign.messages import Assignment
from pageproof.oracle.case import Case


class DeadWorker:
    """A handle whose process ends whenever it is heard, at a case or outside of any."""

    def __init__(self, case: Case | None, task: Assignment | None, *, is_sure: bool = True) -> None:
        self.case_at_work, self.task, self.is_sure = case, task, is_sure
        self.connection, self.clock, self.overdue = self, [0.0, 1.0], False
        self.position, self.ahead = 0, frozenset({2})

    def recv(self) -> object:
        raise EOFError

    def death(self) -> str:
        return "gone"


class NoPool:
    def replace(self, handle: object) -> None:
        pass


def controller(folder: Path) -> Controller:
    options = Options(findings=folder, target="campaign_helpers:Fake")
    made = Controller(options, Summary(options=options, device="cpu", workers=1, versions={}), [])
    made.summary.candidate = "fake"
    made.pool = NoPool()  # type: ignore[assignment]
    return made
