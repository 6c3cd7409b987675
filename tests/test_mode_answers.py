"""The reference is asked once for all steps of a case, when they ran; what it finds wrong is told of the right one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge, questions
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.case import MODES
from pageproof.oracle.replays import answers
from pageproof.oracle.replays.sequence import OWN, Step, steps_of
from pageproof.oracle.verdict import Verdict

SPEC = Spec(dtype="float32", num_kv_heads=2, head_size=16, head_size_v=16)
BATCH = BatchShape(query_lens=(1, 5, 0, 3), seq_lens=(33, 17, 0, 9))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# An odd seed has the KV update between the graphs, where the reference may read slots on the host.
CASE = Case(spec=SPEC, batch=BATCH, mode="piecewise", seed=3)
on_devices = pytest.mark.parametrize("device", DEVICES)


class Planted(Reference):
    """The reference, with something of its own done in calls of some of the case's replays."""

    modes = MODES
    name = "planted"

    def __init__(self, case: Case = CASE) -> None:
        self.calls = 0
        self.of_replay: Counter[int] = Counter()
        self.steps = [_lengths(step) for step in steps_of(case).replayed]

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        super().call(operation, arguments)
        self.calls += 1
        if operation == "attention":
            batch = arguments["batch"]
            found = batch.cu_seqlens_q.diff().tolist(), batch.seq_lens.tolist()
            number = self.steps.index(found) if found in self.steps else -1  # the first with these lengths
            self.of_replay[number] += 1
            self.after(number, arguments)

    def after(self, number: int, arguments: dict[str, Any]) -> None:
        """What is done after the call; number -1: not a replay's step, but one that is captured."""


class WrongIn(Planted):
    """Outputs of one replay's step are wrong in all calls, or in so many."""

    def __init__(self, number: int, calls: int = 1000) -> None:
        super().__init__()
        self.number, self.wrong_calls = number, calls

    def after(self, number: int, arguments: dict[str, Any]) -> None:
        if number == self.number and self.of_replay[number] <= self.wrong_calls:
            arguments["out"] += 1.0


class RaisesLater(WrongIn):
    def after(self, number: int, arguments: dict[str, Any]) -> None:
        super().after(number, arguments)
        if number > self.number:
            raise RuntimeError("later")


class WritesLater(WrongIn):
    """Into a cache that it may only read."""

    def after(self, number: int, arguments: dict[str, Any]) -> None:
        super().after(number, arguments)
        if number > self.number:
            arguments["v_cache"].zero_()


class Covering(Planted):
    """Its outputs are 0; later it makes the values, in memory that it was given for this step, 0 as well."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[int, Tensor] = {}
        self.times: Counter[int] = Counter()

    def after(self, number: int, arguments: dict[str, Any]) -> None:
        cache = arguments["v_cache"]
        self.given[cache.data_ptr()] = cache
        self.times[cache.data_ptr()] += 1
        for place, earlier in self.given.items():
            if self.times[place] == 1 and place != cache.data_ptr():
                earlier.zero_()
        arguments["out"].zero_()


def _lengths(step: Step) -> tuple[list[int], list[int]]:
    return list(step.case.batch.query_lens), list(step.case.batch.seq_lens)


def judged(candidate: Planted, device: str = "cpu", case: Case = CASE) -> Verdict:
    return judge(case, candidate, device)


def asked(monkeypatch: pytest.MonkeyPatch, candidate: Planted) -> list[tuple[int, int]]:
    """(steps, calls of the candidate until then) of each time that the reference is asked."""
    log = []
    original = questions.evaluate_together

    def watched(problems: Any, *args: Any, **named: Any) -> Any:
        log.append((len(problems), candidate.calls))
        return original(problems, *args, **named)

    monkeypatch.setattr(questions, "evaluate_together", watched)
    return log


@pytest.mark.parametrize("groups", [1, 2])
def test_the_reference_is_asked_once_for_each_layer_when_all_steps_ran(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASE, cache_groups=groups, recipe="tagged")
    candidate = Planted(case)
    log = asked(monkeypatch, candidate)
    judged(candidate, case=case).require()
    assert log == [(len(set(steps_of(case).replayed)), candidate.calls)] * groups


def test_rewritten_steps_have_no_statistics_and_are_asked_about_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = Planted()
    log = asked(monkeypatch, candidate)
    judged(candidate).require()
    assert [steps for steps, _ in log] == [4, 1]


def test_steps_that_are_large_do_not_wait_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is asked about when it ran, and the largest errors are the same."""
    together = dict(judged(Planted()).ratios)
    monkeypatch.setattr(answers, "WAITING_BYTES", 0)
    candidate = Planted()
    log = asked(monkeypatch, candidate)
    verdict = judged(candidate)
    verdict.require()
    assert [steps for steps, _ in log] == [1] * 5
    calls = [number for _, number in log]
    assert calls == sorted(set(calls))
    assert dict(verdict.ratios) == pytest.approx(together, rel=1e-6)


@on_devices
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_wrong_value_is_found_in_any_step(number: int, device: str) -> None:
    verdict = judged(WrongIn(number), device)
    assert verdict.outcome is Outcome.DIFFERS
    assert {mismatch.output for mismatch in verdict.mismatches} == {"out"}


@on_devices
@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_that_another_plain_call_has_not_is_told_of_its_replay(number: int, device: str) -> None:
    """The replay and the plain call after it have the same bits."""
    verdict = judged(WrongIn(number, calls=2), device)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    step = steps_of(CASE).replayed[number]
    assert f"replay {number + 1} of 6 ({step.profile}: " in verdict.reason
    assert "a plain call agrees" in verdict.reason
    assert {mismatch.output for mismatch in verdict.mismatches} == {"out"}


@pytest.mark.parametrize("make", [RaisesLater, WritesLater])
def test_what_went_wrong_first_is_told_first(make: type[WrongIn]) -> None:
    verdict = judged(make(1))
    assert verdict.outcome is Outcome.DIFFERS
    assert verdict.mismatches
    assert judged(make(1, calls=0)).outcome in (Outcome.CRASHED, Outcome.OUT_OF_BOUNDS)


@on_devices
def test_the_answer_is_made_from_what_was_built(device: str) -> None:
    """Not from what a candidate makes of the memory of steps that it is done with."""
    verdict = judged(Covering(), device)
    assert verdict.outcome is Outcome.DIFFERS
    assert {mismatch.output for mismatch in verdict.mismatches} == {"out"}


def test_the_steps_that_are_asked_about_here_differ_in_their_lengths() -> None:
    """So that a candidate can tell them apart; the case's own batch comes three times."""
    replayed = steps_of(CASE).replayed
    lengths = [_lengths(step) for step in replayed]
    assert [lengths.index(_lengths(step)) for step in replayed] == [0, 1, 2, 1, 4, 1]
    assert [step.profile for step in replayed].count(OWN) == 2
