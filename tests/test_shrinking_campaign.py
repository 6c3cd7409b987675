"""A campaign shrinks what it finds, also what kills or holds its workers, and begins with what was found before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pageproof.oracle import campaign, cli
from pageproof.oracle.campaign import Options, Summary, report, worker
from pageproof.oracle.campaign.findings import Failure, Findings, Stage, original_of
from pageproof.oracle.campaign.messages import Assignment, Setup, Trial, Tried
from pageproof.oracle.campaign.past import Past
from pageproof.oracle.campaign.sampler import Group
from pageproof.oracle.campaign.shrinker import Shrinker
from pageproof.oracle.campaign.summary import JUDGE
from pageproof.oracle.case import BatchShape, Case, Spec
from pageproof.oracle.verdict import Outcome, Verdict

from . import campaign_helpers as helpers

SMALL = Case(
    spec=Spec(dtype="float32", num_kv_heads=1, group_size=1, alibi=True, sinks=True),
    batch=BatchShape(query_lens=(1, 2), seq_lens=(3, 2)),
    poison="",
)
PLAIN = Case(batch=BatchShape(query_lens=(1, 2), seq_lens=(3, 4)))


@pytest.fixture(autouse=True)
def _helpers_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """By worker processes as well, which inherit the path."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # restores what --in-process sets


def run(folder: Path, judge: str, **changes: object) -> Summary:
    settings: dict[str, object] = {
        "target": "campaign_helpers:Fake",
        "judge": f"campaign_helpers:{judge}",
        "device": "cpu",
        "findings": folder / "findings",
        "shrink_seconds": 200.0,
    }
    return campaign.run(Options(**(settings | changes)))  # type: ignore[arg-type]


def test_a_case_that_kills_its_worker_is_shrunk(tmp_path: Path) -> None:
    summary = run(tmp_path, "leaves_with_sinks", given=(SMALL,))
    (finding,) = summary.findings
    assert (finding.failure.symptom.outcome, finding.stage, finding.count) == ("crashed", Stage.SHRUNK, 1)
    assert finding.failure.case.spec == replace(SMALL.spec, alibi=False)
    assert finding.failure.case.batch == BatchShape()
    assert "exit status 3" in finding.failure.text
    assert summary.tally.cases == 1  # trials are no cases
    assert summary.trials > 3
    assert finding.path is not None
    assert Case.from_json(finding.path.read_text()) == finding.failure.case
    assert Case.from_json(original_of(finding.path).read_text()) == SMALL


def test_a_case_that_holds_its_worker_is_shrunk(tmp_path: Path) -> None:
    summary = run(tmp_path, "hangs_with_two_tokens", given=(SMALL,), case_seconds=1.5)
    (finding,) = summary.findings
    assert finding.failure.symptom.outcome == "timed-out"
    assert finding.stage is Stage.SHRUNK
    assert finding.failure.case.batch.num_tokens == 2
    assert not finding.failure.features


@pytest.mark.parametrize("lost", [False, True])
def test_a_worker_that_loses_its_device_over_a_case_says_so_and_ends(
    lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a case of a group and over a trial alike."""
    setup = Setup(
        number=0, target="campaign_helpers:Fake", device="cpu", judge=JUDGE, inflight=tmp_path / "inflight-0.json"
    )
    said: list[Any] = []
    ended: list[int] = []
    made = worker._Worker(SimpleNamespace(send=said.append), setup, [0.0, 0.0, 0.0])  # type: ignore[arg-type]
    made.asking.judge = lambda case, *_: Verdict(
        outcome=Outcome.CRASHED, case=case, candidate="fake", reason="illegal access"
    )
    monkeypatch.setattr(type(made.asking), "device_is_lost", lambda _: lost)
    monkeypatch.setattr("os._exit", ended.append)
    made.attempt(Trial(number=1, case=PLAIN))
    made.run(Assignment(group=Group(seed=0, index=0, given=(PLAIN,))))
    assert isinstance(said[0], Tried)
    assert said[0].lost is lost
    assert any(message.lost for message in said if not isinstance(message, Tried)) is lost
    assert ended == [worker.DEVICE_LOST] * 2 * lost


def test_what_fails_only_after_something_else_is_said_to(tmp_path: Path) -> None:
    summary = run(tmp_path, "differs_once", given=(SMALL,))
    (finding,) = summary.findings
    assert finding.stage is Stage.UNSTEADY
    assert finding.failure.case == SMALL
    assert "did not fail again" in report.closing(summary)


def test_past_findings_come_first_and_stay(tmp_path: Path) -> None:
    folder = tmp_path / "findings"
    folder.mkdir()
    still, gone, original = PLAIN.with_spec(sinks=True, softcap=2.0), PLAIN.with_spec(sinks=True), PLAIN
    far = PLAIN.with_spec(far_pages=True)
    for name, case in {"still": still, "gone": gone, "still.original": original, "far": far}.items():
        (folder / f"{name}.json").write_text(case.to_json())
    (folder / "broken.json").write_text("{")
    summary = run(tmp_path, "broken_with_sinks", cases=1, workers=1)
    assert (summary.past.failing, summary.past.passing) == ([folder / "still.json"], [folder / "gone.json"])
    assert summary.past.left_out == [folder / "broken.json", folder / "far.json"]
    assert summary.tally.cases == 3
    (finding,) = summary.findings
    assert (finding.path, finding.stage) == (folder / "still.json", Stage.SHRUNK)  # its original says so
    assert {path.name for path in folder.iterdir()} == {
        "still.json", "gone.json", "still.original.json", "far.json", "broken.json"
    }  # fmt: skip
    said = "1 of 2 past findings fail, 1 no longer; 2 left out, too large for this device or not a case any more"
    assert said in report.closing(summary)
    body = json.loads(report.to_json(summary))
    assert body["past"]["failing"] == [str(folder / "still.json")]
    assert body["findings"][0]["stage"] == "shrunk"


def test_past_findings_may_lie_elsewhere_and_are_not_touched_there(tmp_path: Path) -> None:
    past = tmp_path / "past"
    past.mkdir()
    case = PLAIN.with_spec(sinks=True, softcap=2.0, alibi=True)
    (past / "one.json").write_text(case.to_json())
    summary = run(tmp_path, "broken_with_sinks", cases=1, workers=1, past=past)
    (finding,) = summary.findings
    assert finding.stage is Stage.SHRUNK
    assert finding.failure.features == {"sinks", "softcap"}
    assert finding.path is not None
    assert finding.path.parent == tmp_path / "findings"
    assert [path.name for path in past.iterdir()] == ["one.json"]
    assert (past / "one.json").read_text() == case.to_json()


def test_a_past_finding_that_was_not_reached_is_said_to_be() -> None:
    past = Past(files={PLAIN: Path("a"), SMALL: Path("b")})
    past.note(helpers.agreeing(PLAIN, helpers.Fake(), "cpu"))
    assert past.line() == "0 of 1 past findings fail, 1 no longer; 1 not reached"
    past.note(replace(helpers.agreeing(SMALL, helpers.Fake(), "cpu"), outcome=Outcome.NOT_JUDGED))
    assert past.line().endswith("1 not reached")
    assert Past().line() == ""


def failure(**spec: object) -> Failure:
    return Failure.of(helpers.differs(PLAIN.with_spec(**spec)))


def drive(shrinker: Shrinker, workers: int, turns: int = 10_000) -> None:
    """Judge trials as workers do: what has sinks differs."""
    for _ in range(turns):
        trial = shrinker.next_trial(workers)
        if trial is None:
            return
        agrees = helpers.agreeing(trial.case, helpers.Fake(), "cpu")
        shrinker.tell(trial, helpers.differs(trial.case) if trial.case.spec.sinks else agrees)


def test_findings_with_the_same_signature_once_shrunk_are_one(tmp_path: Path) -> None:
    findings = Findings(tmp_path)
    for features in ({"softcap": 2.0}, {"alibi": True}, {"odd_strides": True}):
        findings.add(failure(sinks=True, **features))
    assert len(findings) == 3
    shrinker = Shrinker(findings, seconds=100.0)
    shrinker.all_are_drawn()
    drive(shrinker, workers=2)
    (finding,) = findings
    assert (finding.count, finding.stage, finding.failure.features) == (3, Stage.SHRUNK, {"sinks"})
    assert finding.path is not None
    stem = finding.path.stem
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.json", f"{stem}.txt", f"{stem}.original.json"}
    # What any of the three was found with is known.
    assert not findings.add(failure(sinks=True, alibi=True, causal=False))
    findings.repeat(failure(sinks=True, odd_strides=True).signature, 5)
    assert (len(findings), finding.count) == (1, 9)


def test_while_cases_are_drawn_few_workers_shrink_and_one_alone_does_not() -> None:
    findings = Findings()
    for features in ({"softcap": 2.0}, {"alibi": True}, {"odd_strides": True}):
        findings.add(failure(sinks=True, **features))
    shrinker = Shrinker(findings, seconds=100.0)
    assert shrinker.next_trial(1) is None
    assert shrinker.next_trial(4) is not None
    assert shrinker.next_trial(4) is None  # one in four
    shrinker.all_are_drawn()
    assert [shrinker.next_trial(3) is not None for _ in range(3)] == [True, True, False]


def test_what_there_was_no_time_for_is_counted_with_what_explains_it() -> None:
    """Found with the same symptom and all the features of one that was shrunk to the end."""
    findings = Findings()
    for features in ({"softcap": 2.0}, {"alibi": True}, {"odd_strides": True}):
        findings.add(failure(sinks=True, **features))
    other = failure(sliding_window=4)
    findings.add(other)
    shrinker = Shrinker(findings, seconds=100.0)
    shrinker.all_are_drawn()
    while not any(finding.stage is Stage.SHRUNK for finding in findings):
        drive(shrinker, workers=1, turns=1)
    shrinker.close()
    counts = {finding.failure.features: (finding.count, finding.stage) for finding in findings}
    assert counts[frozenset({"sinks"})] == (3, Stage.SHRUNK)
    assert counts[other.features][1] is not Stage.SHRUNK
    assert len(counts) == 2


def test_a_search_that_is_cut_short_keeps_what_it_has(tmp_path: Path) -> None:
    findings = Findings(tmp_path)
    large = PLAIN.with_spec(sinks=True, alibi=True).with_batch(query_lens=(1,) * 9, seq_lens=(30,) * 9)
    findings.add(Failure.of(helpers.differs(large)))
    (finding,) = findings
    path = finding.path
    shrinker = Shrinker(findings, seconds=100.0)
    shrinker.all_are_drawn()
    drive(shrinker, workers=1, turns=3)
    assert finding.stage is Stage.TAKEN_UP
    assert path is not None
    assert Case.from_json(path.read_text()) == large  # the file is replaced once, when it is over
    shrinker.close()
    assert finding.stage is Stage.PARTLY
    assert Case.from_json(path.read_text()) == finding.failure.case != large
    assert Case.from_json(original_of(path).read_text()) == large


def test_without_time_nothing_is_shrunk() -> None:
    findings = Findings()
    findings.add(failure(sinks=True))
    shrinker = Shrinker(findings, seconds=0.0)
    assert shrinker.over
    shrinker.all_are_drawn()
    assert shrinker.next_trial(4) is None
    shrinker.close()
    assert [finding.stage for finding in findings] == [Stage.FOUND]


@pytest.mark.parametrize("flags", [[], ["--in-process"]], ids=["apart", "in process"])
def test_replay_prints_the_small_case(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "case.json"
    path.write_text(PLAIN.with_spec(sinks=True, softcap=2.0).to_json())
    target = ["--target", "campaign_helpers:Wrong", "--device", "cpu"]
    assert cli.main(["replay", str(path), "--shrink", *target, *flags]) == 1
    printed = capsys.readouterr().out
    text = printed[printed.index("The case, shrunk:\n") :].partition("\n")[2]
    small = Case.from_json(text)
    assert (small.batch.num_requests, small.spec.sinks, small.spec.softcap) == (1, False, None)
