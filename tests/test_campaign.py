"""A campaign counts what it judged, survives what it judges, and keeps findings that replay."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pageproof.oracle import campaign
from pageproof.oracle.building import pinned
from pageproof.oracle.campaign import Options, Summary, report, worker
from pageproof.oracle.campaign.asking import OUT_OF_MEMORY, Asking
from pageproof.oracle.campaign.controller import DEATHS_PER_GROUP, FRUITLESS_DEATHS
from pageproof.oracle.campaign.findings import Failure, Findings
from pageproof.oracle.campaign.lengths import INTERPRETED
from pageproof.oracle.campaign.messages import Assignment, Setup
from pageproof.oracle.campaign.offers import make_plan
from pageproof.oracle.campaign.pairs import MODEL
from pageproof.oracle.campaign.sampler import random_group
from pageproof.oracle.campaign.summary import JUDGE
from pageproof.oracle.campaign.tally import Tally, median
from pageproof.oracle.case import BatchShape, Case, Spec
from pageproof.oracle.environment import Unusable
from pageproof.oracle.verdict import Outcome, Verdict

from . import campaign_helpers as helpers
from .dead_workers import DeadWorker, controller

PLAIN = Case(batch=BatchShape(query_lens=(1, 2), seq_lens=(3, 4)))


@pytest.fixture(autouse=True)
def _helpers_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """By worker processes as well, which inherit the path."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def run(folder: Path, **changes: object) -> Summary:
    settings: dict[str, object] = {
        "target": "campaign_helpers:Fake",
        "judge": "campaign_helpers:agreeing",
        "device": "cpu",
        "seconds": 120.0,
        "findings": folder / "findings",
    }
    return campaign.run(Options(**(settings | changes)))  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_cases_on_any_number_of_workers(tmp_path: Path) -> None:
    one, two = (run(tmp_path, workers=workers, cases=260, seed=3) for workers in (1, 2))
    for summary in (one, two):
        assert (summary.tally.cases, sum(summary.tally.outcomes.values())) == (260, 260)
        assert summary.pairs_covered == len(summary.feasible) > 4000  # all of them, before the first random case
        assert summary.notes[1:] == ("a note of the candidate",)
        assert not (tmp_path / "findings").exists()
    for name in ("features", "keys", "tokens", "visible", "worst"):
        assert getattr(one.tally, name) == getattr(two.tally, name)


def test_findings_are_told_apart_by_their_smallest_features(tmp_path: Path) -> None:
    """A fault that needs two features is one finding for each operation, whatever else was on."""
    settings = {"target": "campaign_helpers:Picky", "judge": "campaign_helpers:broken_with_sinks"}
    summary = run(tmp_path, cases=400, workers=2, **settings)
    failed = summary.tally.outcomes["differs"]
    assert failed > 20
    assert summary.findings.failures == failed
    operations = {finding.failure.case.spec.operation for finding in summary.findings}
    assert len(summary.findings) == len(operations) == 3
    for finding in summary.findings:
        assert finding.failure.features == {"sinks", "softcap"}
        assert finding.path is not None
        case = Case.from_json(finding.path.read_text())
        assert case == finding.failure.case
        assert case.spec.sinks
        assert "differs" in finding.path.with_suffix(".txt").read_text()
    files = sorted(path.name for path in (tmp_path / "findings").iterdir())
    assert len(files) == 3 * len(summary.findings)  # one is the case as it was found
    # What the target declines is counted apart, and takes no other pair along.
    assert summary.banned == {("q_dtype", "float8_e4m3fn")}
    assert summary.tally.declined.keys() <= {"no alibi beside sinks"}
    assert summary.tally.cases + sum(summary.tally.declined.values()) == 400
    lost = summary.tally.pairs.missing(MODEL, summary.feasible)
    assert all(("q_dtype", "float8_e4m3fn") in pair or pair == {("alibi", True), ("sinks", True)} for pair in lost)
    body = json.loads(report.to_json(summary))
    assert body["cases"] == summary.tally.cases
    assert sum(finding["cases"] for finding in body["findings"]) == failed
    assert body["pairs"]["covered"] == len(summary.feasible) - len(lost)


def test_a_case_that_kills_or_hangs_its_worker_costs_itself_only(tmp_path: Path) -> None:
    fates = ("AGREES", "DIES", "DIFFERS", "LEAVES", "HANGS", "RAISES", "DECLINED", "AGREES")
    given = tuple(replace(PLAIN, seed=getattr(helpers, fate)) for fate in fates)
    summary = run(tmp_path, judge="campaign_helpers:by_seed", given=given, case_seconds=1.5, shrink_seconds=0)
    outcomes = [verdict.outcome for verdict in summary.verdicts]
    crashed, hung = Outcome.CRASHED, Outcome.TIMED_OUT
    expected = [Outcome.AGREES, crashed, Outcome.DIFFERS, crashed, hung, crashed, Outcome.DECLINED, Outcome.AGREES]
    assert outcomes == expected
    assert [verdict.case for verdict in summary.verdicts] == list(given)
    names = {(verdict.candidate, verdict.target) for verdict in summary.verdicts}
    assert names == {("fake", "campaign_helpers:Fake")}
    reasons = [verdict.reason for verdict in summary.verdicts]
    assert "SIGSEGV" in reasons[1]
    assert "exit status 3" in reasons[3]
    assert "a fault of the judge" in reasons[5]
    assert summary.tally.cases == 7
    assert summary.tally.declined == {"not here": 1}
    names = {path.name.rsplit("-", 1)[0] for path in (tmp_path / "findings").glob("*.json")}
    assert names == {"crashed", "differs", "timed-out"}  # and no in-flight file


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": "campaign_helpers:Unwilling"}, "declines all of"),
        ({"target": "campaign_helpers:Nobody"}, "found no 'Nobody'"),
        ({"target": "nonsense"}, "expected ours, reference"),
    ],
)
def test_a_target_that_cannot_be_judged_is_an_error(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(Unusable, match=said):
        run(tmp_path, workers=1, **changes)
    assert not list(tmp_path.rglob("inflight*"))


def test_a_group_that_costs_too_many_workers_is_left(tmp_path: Path) -> None:
    made = controller(tmp_path)
    task = Assignment(group=random_group(0, 0, INTERPRETED))
    for deaths in range(1, DEATHS_PER_GROUP + 1):
        assert made.summary.abandoned == 0
        made._hear(DeadWorker(replace(PLAIN, seed=deaths), task))  # type: ignore[arg-type]
        if deaths < DEATHS_PER_GROUP:
            task = made.resumed.popleft()
            assert task.deaths == deaths
            assert task.skip == {1, 2}  # the case that it died of, and one that was judged before its turn
    assert (made.summary.abandoned, len(made.resumed)) == (1, 0)
    assert made.summary.tally.outcomes == {"crashed": DEATHS_PER_GROUP}  # every one of them is a finding's case
    (finding,) = made.summary.findings
    assert finding.failure.text.startswith("fake: crashed\ngone\n")
    assert finding.failure.text.endswith(" --target campaign_helpers:Fake")


def test_workers_that_keep_ending_outside_of_any_case_end_the_campaign(tmp_path: Path) -> None:
    made = controller(tmp_path)
    for _ in range(FRUITLESS_DEATHS - 1):
        made._hear(DeadWorker(None, None))  # type: ignore[arg-type]
    with pytest.raises(Unusable, match=r"^worker processes keep ending outside of any case: gone$"):
        made._hear(DeadWorker(None, None))  # type: ignore[arg-type]


def a_setup(folder: Path) -> Setup:
    return Setup(number=0, target="campaign_helpers:Fake", device="cpu", judge=JUDGE, inflight=folder / "inflight")


def asking(judge: Callable[..., Verdict]) -> Asking:
    return Asking(candidate=helpers.Fake(), target="campaign_helpers:Fake", device=torch.device("cpu"), judge=judge)


def test_a_case_without_device_memory_is_tried_again_and_then_not_judged() -> None:
    failures = 0

    def judge(case: Case, candidate: helpers.Fake, device: object) -> Verdict:
        nonlocal failures
        if not failures:
            return helpers.agreeing(case, candidate, device)
        failures -= 1
        raise torch.OutOfMemoryError("CUDA out of memory")

    made = asking(judge)
    failures = 1
    assert made.alone(PLAIN).outcome is Outcome.AGREES
    failures = 2
    verdict = made.alone(PLAIN)
    assert (verdict.outcome, verdict.failed, failures) == (Outcome.NOT_JUDGED, False, 0)
    assert verdict.reason == f"{OUT_OF_MEMORY} (the oracle's request)"
    tally = Tally()
    tally.add(verdict, MODEL)
    assert (tally.cases, tally.declined, tally.not_judged) == (0, {}, {verdict.reason: 1})


@pytest.mark.parametrize("words", ["torch.OutOfMemoryError: CUDA", "Triton Error [CUDA]: out of memory"])
def test_a_candidate_without_device_memory_is_excused_only_by_a_full_device(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = Verdict(outcome=Outcome.CRASHED, case=PLAIN, candidate="fake", reason=words)
    made = asking(lambda *_: crash)
    assert made.alone(PLAIN).outcome is Outcome.CRASHED  # on a CPU, or on a device with room, it is a finding
    monkeypatch.setattr(Asking, "_device_is_full", lambda _: True)
    verdict = made.alone(PLAIN)
    assert verdict.outcome is Outcome.NOT_JUDGED
    assert verdict.reason == f"{OUT_OF_MEMORY} (the candidate's request)"
    other = replace(crash, reason="something else")
    assert asking(lambda *_: other).alone(PLAIN).outcome is Outcome.CRASHED


def test_a_worker_refuses_where_cases_have_other_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pinned.DIGESTS, "plain", "other bits")
    with pytest.raises(Unusable, match="cases are not the same here as everywhere: case 'plain'"):
        worker._Worker(None, a_setup(tmp_path), [0.0, 0.0])  # type: ignore[arg-type]


def failure(**spec: object) -> Failure:
    case = replace(PLAIN, spec=Spec(**spec))  # type: ignore[arg-type]
    return Failure.of(helpers.differs(case))


def test_what_findings_keep_does_not_depend_on_the_order() -> None:
    failures = [
        failure(sinks=True, softcap=2.0, alibi=True),
        failure(sinks=True, softcap=2.0),
        failure(sinks=True, softcap=2.0, causal=False, sliding_window=4),
        failure(alibi=True, causal=False),
        failure(sinks=True, softcap=2.0, operation="mla_attention"),
        replace(failure(sinks=True, softcap=2.0), case=replace(PLAIN, seed=9, spec=Spec(sinks=True, softcap=2.0))),
    ]
    kept = set()
    for seed in range(30):
        order = random.Random(seed).sample(failures, len(failures))
        findings = Findings()
        for item in order:
            findings.add(item)
        assert findings.failures == len(failures)
        kept.add(frozenset(finding.failure.case for finding in findings))
    assert kept == {frozenset(failures[index].case for index in (1, 3, 4))}


def test_a_finding_that_is_replaced_leaves_no_file(tmp_path: Path) -> None:
    findings = Findings(tmp_path)
    assert findings.add(failure(sinks=True, alibi=True))
    assert findings.add(failure(sinks=True))
    assert not findings.add(failure(sinks=True, alibi=True))
    findings.repeat(failure(sinks=True, alibi=True).signature, 5)
    (only,) = findings
    assert only.count == 8
    assert {path.stem for path in tmp_path.iterdir()} == {only.failure.name}


def test_tallies_add_up_in_any_order() -> None:
    cases = [replace(PLAIN, seed=seed).with_spec(sinks=seed % 2 == 0) for seed in range(12)]
    verdicts = [helpers.broken_with_sinks(case, helpers.Fake(), "cpu") for case in cases]
    verdicts.append(Verdict(outcome=Outcome.DECLINED, case=PLAIN, candidate="fake", reason="no"))
    whole = Tally()
    parts = [Tally(), Tally()]
    for index, verdict in enumerate(verdicts):
        whole.add(verdict, MODEL)
        parts[index % 2].add(verdict, MODEL)
    for first, second in ((0, 1), (1, 0)):
        total = Tally()
        total.merge(parts[first])
        total.merge(parts[second])
        assert total == whole
    assert (whole.cases, whole.declined, whole.tokens) == (12, {"no": 1}, {3: 12})


def test_the_worst_ratio_is_that_of_a_case_that_agrees() -> None:
    tally = Tally()
    worse = replace(helpers.differs(PLAIN), ratios=(("out", 40.0),))
    for verdict in (helpers.agreeing(replace(PLAIN, seed=2**31), helpers.Fake(), "cpu"), worse):
        tally.add(verdict, MODEL)
    assert tally.worst_of("out") == (0.5, "bfloat16")


def test_the_median_is_of_cases_not_of_values() -> None:
    assert median(Counter({1: 5, 100: 2, 7: 3})) == 1
    assert median(Counter({1: 1, 100: 2, 7: 3})) == 7
    assert median(Counter()) == 0


def test_a_plan_is_the_same_for_the_same_seed() -> None:
    plans = [make_plan(helpers.Picky(), 4, INTERPRETED) for _ in range(2)]
    assert plans[0] == plans[1]
