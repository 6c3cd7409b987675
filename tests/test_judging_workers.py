"""A worker that judges many cases together keeps account of each of them, whatever happens on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pageproof.oracle import Case, Spec, questions
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.campaign import asking, lengths, worker
from pageproof.oracle.campaign.lengths import INTERPRETED
from pageproof.oracle.campaign.messages import Assignment, Report, Setup
from pageproof.oracle.campaign.pairs import Model
from pageproof.oracle.campaign.sampler import Group, random_group
from pageproof.oracle.campaign.summary import JUDGE
from pageproof.oracle.case import MODES, BatchShape
from pageproof.oracle.verdict import Outcome, Verdict

SIZES = replace(INTERPRETED, cases_per_key=20, reads_share=0.0)
SPEC = Spec(dtype="float32", num_kv_heads=1, group_size=2, head_size=16, head_size_v=16)
BATCH = BatchShape(query_lens=(1, 4), seq_lens=(40, 9), padding_tokens=1)


class Heard:
    """A campaign's end of the connection."""

    def __init__(self) -> None:
        self.messages: list[Report] = []

    def send(self, message: Report) -> None:
        self.messages.append(message)


def a_worker(folder: Path, monkeypatch: pytest.MonkeyPatch, candidate: str) -> tuple[worker._Worker, Heard]:
    monkeypatch.setattr(lengths, "INTERPRETED", replace(SIZES, together=True))
    setup = Setup(number=0, target=candidate, device="cpu", judge=JUDGE, inflight=folder / "inflight")
    heard = Heard()
    return worker._Worker(heard, setup, [0.0, 0.0, 0.0]), heard  # type: ignore[arg-type]


def test_a_worker_reports_every_case_of_a_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, heard = a_worker(tmp_path, monkeypatch, "reference")
    banned = frozenset(("mode", mode) for mode in MODES[1:])
    group = replace(random_group(3, 1, SIZES), count=40)
    made.run(Assignment(group=group, start=3, skip=frozenset({5, 39}), banned=banned))
    assert sum(report.tally.cases for report in heard.messages) == 35
    assert heard.messages[-1].done
    assert (heard.messages[-1].position, heard.messages[-1].ahead) == (40, frozenset())


class Crashing(Reference):
    """Raises at its seventh call."""

    calls = 0

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        Crashing.calls += 1
        if Crashing.calls == 7:
            raise RuntimeError("seventh")
        return super().call(operation, arguments)


def test_a_case_that_loses_the_device_is_told_ahead_of_those_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, heard = a_worker(tmp_path, monkeypatch, "reference")
    made.candidate = made.asking.candidate = Crashing()
    Crashing.calls = 0
    monkeypatch.setattr(type(made.asking), "device_is_lost", lambda _: True)
    monkeypatch.setattr(worker.os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    cases = Plain(seed=0, index=0, count=12)
    with pytest.raises(SystemExit, match=str(worker.DEVICE_LOST)):
        made.run(Assignment(group=cases))
    (report,) = heard.messages
    assert (report.lost, report.position, report.ahead) == (True, 0, frozenset({6}))
    assert report.tally.outcomes == {"crashed": 1}
    assert made.clock[1] == 6


class Plain(Group):
    """Cases of one kernel and nothing else."""

    def cases(self, model: Model, sizes: Any) -> Any:
        return (Case(spec=SPEC, batch=BATCH, seed=seed) for seed in range(self.count))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), RuntimeError("a fault of the oracle's")])
def test_an_evaluation_that_fails_loses_no_case(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, heard = a_worker(tmp_path, monkeypatch, "reference")

    evaluate = questions.evaluate_together

    def failing(problems: Any, *rest: Any, **others: Any) -> Any:
        if len(problems) > 1:
            raise error
        return evaluate(problems, *rest, **others)

    monkeypatch.setattr(questions, "evaluate_together", failing)
    made.run(Assignment(group=Plain(seed=0, index=0, count=12)))
    (report,) = heard.messages
    assert (report.done, report.tally.cases) == (True, 12)
    told = [failure for failure in report.failures if "a fault of the oracle's" in failure.text]
    memory = isinstance(error, torch.OutOfMemoryError)
    assert report.tally.outcomes == ({"agrees": 12} if memory else {"agrees": 11, "crashed": 1})
    assert [failure.case.seed for failure in told] == ([] if memory else [11])  # nobody's fault: the last one's


def test_who_fails_alone_is_the_one_that_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Transposing(Reference):
        """Leaves the queries of one case in another form, which no evaluation of several bears."""

        calls = 0

        def call(self, operation: str, arguments: dict[str, Any]) -> Any:
            returned = super().call(operation, arguments)
            if int(arguments["batch"].seq_lens[0]) == 41:
                arguments["q"].transpose_(0, 2)
            return returned

    made, heard = a_worker(tmp_path, monkeypatch, "reference")
    made.candidate = made.asking.candidate = Transposing()
    made.run(Assignment(group=OneIsLonger(seed=0, index=0, count=12)))
    (report,) = heard.messages
    assert report.tally.outcomes["agrees"] == 11
    assert [failure.case.seed for failure in report.failures] == [3]


class OneIsLonger(Plain):
    def cases(self, model: Model, sizes: Any) -> Any:
        for case in super().cases(model, sizes):
            yield case.with_batch(seq_lens=(41, 9)) if case.seed == 3 else case


def test_the_clock_runs_while_many_are_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = a_worker(tmp_path, monkeypatch, "reference")

    class DeclinesTheLast(Reference):
        def declines(self, case: Case) -> str | None:
            return "the last" if case.seed == 11 else None

    made.candidate = made.asking.candidate = DeclinesTheLast()
    clocks = []
    evaluate = questions.evaluate_together

    def watched(*args: Any, **named: Any) -> Any:
        clocks.append(tuple(made.clock))
        return evaluate(*args, **named)

    monkeypatch.setattr(questions, "evaluate_together", watched)
    made.run(Assignment(group=Plain(seed=0, index=0, count=12)))
    ((since, position, _),) = clocks
    assert since > 0
    assert position == 10


def test_no_case_is_begun_after_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, heard = a_worker(tmp_path, monkeypatch, "reference")
    made.run(Assignment(group=Plain(seed=0, index=0, count=12), stop_at=0.0))
    assert (heard.messages[-1].done, heard.messages[-1].tally.cases) == (True, 0)


def test_after_a_death_cases_are_judged_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, heard = a_worker(tmp_path, monkeypatch, "reference")
    monkeypatch.setattr(type(made.asking), "together", lambda *_: pytest.fail("asked together"))
    made.run(Assignment(group=Plain(seed=0, index=0, count=3), deaths=1))
    assert heard.messages[-1].tally.cases == 3


def test_far_pages_are_judged_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = a_worker(tmp_path, monkeypatch, "reference")
    asked: list[int] = []

    def alone(_: object, case: Case) -> Verdict:
        asked.append(case.seed)
        return Verdict(outcome=Outcome.DECLINED, case=case, candidate="reference", reason="too large for a test")

    monkeypatch.setattr(asking.Asking, "alone", alone)
    made.run(Assignment(group=Far(seed=0, index=0, count=3)))
    assert asked == [0, 1, 2]


class Far(Plain):
    def cases(self, model: Model, sizes: Any) -> Any:
        return (case.with_spec(far_pages=True) for case in super().cases(model, sizes))


def test_a_candidate_without_memory_among_many_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnceWithout(Reference):
        calls = 0

        def call(self, operation: str, arguments: dict[str, Any]) -> Any:
            self.calls += 1
            if self.calls == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().call(operation, arguments)

    made, heard = a_worker(tmp_path, monkeypatch, "reference")
    made.candidate = made.asking.candidate = OnceWithout()
    made.run(Assignment(group=Plain(seed=0, index=0, count=4)))
    assert heard.messages[-1].tally.outcomes == {"agrees": 4}


def test_no_case_is_at_work_while_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = a_worker(tmp_path, monkeypatch, "reference")
    clocks = []
    put = worker.os.replace

    def watched(*paths: Any) -> None:
        clocks.append(made.clock[0])
        put(*paths)

    monkeypatch.setattr(worker.os, "replace", watched)
    made.run(Assignment(group=Plain(seed=0, index=0, count=3)))
    assert clocks == [0.0] * 7  # before each is run, before all are asked about, and before each is told of
