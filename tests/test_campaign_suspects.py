"""What befalls a worker while replays still run is told of the case that did it, or else of the one it was at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.campaign import lengths, worker
from pageproof.oracle.campaign.controller import DEATHS_PER_GROUP, UNEXPLAINED, Controller
from pageproof.oracle.campaign.findings import Failure
from pageproof.oracle.campaign.lengths import INTERPRETED
from pageproof.oracle.campaign.messages import Assignment, Report, Setup
from pageproof.oracle.campaign.pairs import Model
from pageproof.oracle.campaign.sampler import Group, random_group
from pageproof.oracle.campaign.summary import JUDGE
from pageproof.oracle.case import MODES, BatchShape, Case, Spec
from pageproof.oracle.verdict import Outcome, Verdict

from .dead_workers import DeadWorker, controller

SPEC = Spec(operation="merge_states", dtype="float16")
CASES = tuple(
    Case(spec=SPEC, batch=BatchShape(query_lens=(1, 2), seq_lens=(3, 4)), mode="piecewise", replays=2, seed=seed)
    for seed in range(4)
)
CRASHED = Verdict(outcome=Outcome.CRASHED, case=CASES[1], candidate="fake", target="fake", reason="CUDA error: illegal")


class Replayed(Group):
    """Some cases in a mode, as if they were drawn."""

    def cases(self, model: Model, sizes: lengths.Sizes) -> Any:
        return iter(CASES)


class Failing(Reference):
    """Raises in the first case whose replays it sees."""

    modes = MODES

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Heard:
    def __init__(self) -> None:
        self.messages: list[Report] = []

    def send(self, message: Report) -> None:
        self.messages.append(message)


@pytest.fixture
def lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The last report of a worker that loses the device in the first case, after so many deaths in the group."""
    monkeypatch.setattr(lengths, "INTERPRETED", replace(INTERPRETED, together=True))
    setup = Setup(number=0, target="reference", device="cpu", judge=JUDGE, inflight=tmp_path / "inflight")
    heard = Heard()
    made = worker._Worker(heard, setup, [0.0, 0.0, 0.0])  # type: ignore[arg-type]
    made.candidate = made.asking.candidate = Failing()
    monkeypatch.setattr(type(made.asking), "device_is_lost", lambda _: True)
    monkeypatch.setattr(worker.os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))

    def after(deaths: int) -> Report:
        with pytest.raises(SystemExit, match=str(worker.DEVICE_LOST)):
            made.run(Assignment(group=Replayed(seed=0, index=0, count=4), deaths=deaths))
        (report,) = heard.messages
        return report

    return after


def test_a_worker_that_loses_the_device_over_replays_names_a_suspect_only(lost: Any) -> None:
    report = lost(deaths=0)
    assert (report.lost, report.position, report.tally.cases, report.failures) == (True, 0, 0, [])
    assert report.suspect is not None
    assert report.suspect.case == CASES[0]


def test_judged_one_by_one_it_is_told_at_once(lost: Any) -> None:
    report = lost(deaths=1)
    assert (report.lost, report.suspect, report.tally.outcomes) == (True, None, {"crashed": 1})


def died(made: Controller, task: Assignment, how: str) -> Assignment:
    """What is left of the task after a worker died over one of several cases."""
    handle = DeadWorker(CASES[1], task, is_sure=False)
    if how == "silently":
        made._hear(handle)  # type: ignore[arg-type]
    else:
        made._add(handle, Report(position=0, lost=True, suspect=CRASHED))  # type: ignore[arg-type]
    assert not list(made.summary.findings)
    return made.resumed.popleft()


@pytest.mark.parametrize("how", ["silently", "with a report"])
def test_the_rest_is_judged_one_by_one_and_nothing_is_skipped(how: str, tmp_path: Path) -> None:
    rest = died(controller(tmp_path), Assignment(group=random_group(0, 0, INTERPRETED)), how)
    assert (rest.start, rest.deaths) == (0, 1)
    assert 1 not in rest.skip
    assert rest.suspect is not None
    assert rest.suspect.case == CASES[1]


@pytest.mark.parametrize("how", ["silently", "with a report"])
def test_the_suspect_is_told_if_no_case_fails(how: str, tmp_path: Path) -> None:
    made = controller(tmp_path)
    handle = DeadWorker(None, died(made, Assignment(group=random_group(0, 0, INTERPRETED)), how))
    made._add(handle, Report(position=3))  # type: ignore[arg-type]
    assert not list(made.summary.findings)
    made._add(handle, Report(position=4, done=True))  # type: ignore[arg-type]
    (finding,) = made.summary.findings
    assert UNEXPLAINED in finding.failure.text
    assert made.summary.tally.outcomes == {"crashed": 1}


def test_a_wrong_value_does_not_explain_it(tmp_path: Path) -> None:
    made = controller(tmp_path)
    handle = DeadWorker(None, died(made, Assignment(group=random_group(0, 0, INTERPRETED)), "silently"))
    own = Failure.of(replace(CRASHED, outcome=Outcome.DIFFERS, case=CASES[0]))
    made._add(handle, Report(position=4, failures=[own], done=True))  # type: ignore[arg-type]
    assert {finding.failure.symptom.outcome for finding in made.summary.findings} == {"differs", "crashed"}


def test_it_is_forgotten_if_one_crashes(tmp_path: Path) -> None:
    made = controller(tmp_path)
    handle = DeadWorker(None, died(made, Assignment(group=random_group(0, 0, INTERPRETED)), "silently"))
    own = Failure.of(replace(CRASHED, case=CASES[0], reason="its own"))
    made._add(handle, Report(position=1, failures=[own]))  # type: ignore[arg-type]
    made._add(handle, Report(position=4, done=True))  # type: ignore[arg-type]
    (finding,) = made.summary.findings
    assert "its own" in finding.failure.text


def test_a_death_over_one_case_alone_explains_it(tmp_path: Path) -> None:
    made = controller(tmp_path)
    task = died(made, Assignment(group=random_group(0, 0, INTERPRETED)), "silently")
    made._hear(DeadWorker(CASES[0], task))  # type: ignore[arg-type]
    assert made.resumed.popleft().suspect is None
    (finding,) = made.summary.findings
    assert UNEXPLAINED not in finding.failure.text


def test_a_group_that_is_left_tells_its_suspect(tmp_path: Path) -> None:
    made = controller(tmp_path)
    task = Assignment(group=random_group(0, 0, INTERPRETED), deaths=DEATHS_PER_GROUP - 1)
    made._hear(DeadWorker(CASES[1], task, is_sure=False))  # type: ignore[arg-type]
    assert (made.summary.abandoned, len(made.resumed)) == (1, 0)
    (finding,) = made.summary.findings
    assert UNEXPLAINED in finding.failure.text
