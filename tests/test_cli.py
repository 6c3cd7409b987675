"""Exit statuses and what is printed: `fuzz` for people and CI, `replay` for `git bisect run`."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import pytest

from pageproof.oracle import cli, environment
from pageproof.oracle.campaign import Options, Summary, progress, report, runner
from pageproof.oracle.campaign.findings import Failure, Findings, features_on
from pageproof.oracle.campaign.pairs import MODEL
from pageproof.oracle.case import MODES, BatchShape, Case, Spec

from . import campaign_helpers as helpers

CASE = Case(batch=BatchShape(query_lens=(1, 2), seq_lens=(3, 4)))


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # for worker processes as well: they inherit the path
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # restores what --in-process sets


@pytest.fixture
def case_file(tmp_path: Path) -> str:
    path = tmp_path / "case.json"
    path.write_text(CASE.to_json())
    return str(path)


def replay(*arguments: str) -> int:
    return cli.main(["replay", *arguments, "--device", "cpu", "--in-process"])


def test_fuzz_agrees_and_says_what_it_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = tmp_path / "summary.json"
    flags = ["--target", "reference", *helpers.FEW, "--cases", "4", "--json", str(summary)]
    assert cli.main(["fuzz", *flags, "--findings", str(tmp_path / "findings")]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("4 cases, 0 findings, ")
    assert "Triton interpreted" in printed
    assert f"\nmodes: eager; reference does not offer {', '.join(MODES[1:])}\n" in printed
    body = json.loads(summary.read_text())
    assert (body["cases"], body["target"], body["device"], body["seed"]) == (4, "reference", "cpu", 0)
    assert body["modes"] == {"eager": {"cases": 4}}
    assert body["versions"].keys() >= {"python", "torch", "triton", "numpy"}
    assert body["pairs"]["feasible"] > 4000
    assert all(0 <= worst["ratio"] <= 1 for worst in body["worst"] if not worst["output"].endswith(" z"))
    assert {(part["formats"], part["output"]) for part in body["spread"]} == {
        (worst["formats"], worst["output"]) for worst in body["worst"]
    }
    for part in body["spread"]:
        assert 0 <= part["median"] <= part["99%"] <= part["99.9%"] <= part["largest"]
        assert 1 <= part["cases"] <= 4


def test_fuzz_of_a_wrong_candidate_prints_lines_that_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--target", "campaign_helpers:Wrong", *helpers.FEW, "--cases", "3"]
    assert cli.main(["fuzz", *flags, "--findings", str(tmp_path / "findings")]) == 1
    printed = capsys.readouterr().out.splitlines()
    (line, *_) = [line.split() for line in printed if line.startswith("  python -m pageproof.oracle replay")]
    assert cli.main([*line[3:], "--device", "cpu"]) == 1  # in a process of its own
    replayed = capsys.readouterr().out
    assert "wrong: unwritten" in replayed or "wrong: differs" in replayed  # the latter where a cache is to be written


def test_replay_of_a_case_that_agrees(case_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(case_file, "--target", "reference") == 0
    assert "reference: agrees" in capsys.readouterr().out


def test_replay_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(CASE.to_json()))
    assert replay("-", "--target", "reference") == 0


def test_replay_of_a_case_that_differs(case_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(case_file, "--target", "campaign_helpers:Wrong") == 1
    assert "Mismatched elements" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema": 99}', "schema: found 99"),
        ("no json", "Expecting value"),
        ('{"schema": 1, "batch": 5}', "int"),
        ('{"schema": 1, "batch": {"query_lens": 1, "seq_lens": 1}}', "int"),
        ('{"schema": 1, "spec": {"colour": 1}}', "unknown fields"),
        ('{"schema": 1, "batch": {"query_lens": [1]}}', "seq_lens"),
    ],
)
def test_replay_of_what_is_no_case(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "case.json"
    path.write_text(text)
    assert replay(str(path), "--target", "reference") == 125
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "target", ["nonsense", "no_such_module:X", "campaign_helpers:Nobody", "campaign_helpers:AGREES"]
)
def test_replay_without_its_target_cannot_run(target: str, case_file: str) -> None:
    assert replay(case_file, "--target", target) == 125


def test_replay_of_a_declined_case_cannot_run(case_file: str) -> None:
    assert replay(case_file, "--target", "campaign_helpers:Unwilling") == 125


def test_replay_of_a_missing_file_cannot_run(tmp_path: Path) -> None:
    assert replay(str(tmp_path / "none.json"), "--target", "reference") == 125


def test_a_fault_of_the_oracle_is_no_verdict(case_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "JUDGE", "campaign_helpers:by_seed")
    raising = CASE.to_json().replace('"schema": 1,', f'"schema": 1,\n  "seed": {helpers.RAISES},')
    Path(case_file).write_text(raising)
    assert replay(case_file, "--target", "campaign_helpers:Fake") >= 128


@pytest.mark.parametrize(
    "flags",
    [["--seconds", "0"], ["--seed", "-1"], ["--cases", "0"], ["--workers", "x"], ["--device", "tpu"], ["--nonsense"]],
)
def test_wrong_usage_ends_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["fuzz", *flags])


@pytest.mark.parametrize("flags", [[], ["case.json", "--device", "tpu"], ["case.json", "--nonsense"]])
def test_wrong_usage_of_replay_says_nothing_about_the_case(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="125"):
        cli.main(["replay", *flags])
    assert "replay: error: " in capsys.readouterr().err


def ended(monkeypatch: pytest.MonkeyPatch, **state: object) -> int:
    """The status of a `fuzz` that counted four cases and then ended like this."""
    summary = counted()
    for name, value in state.items():
        setattr(summary, name, value)
    monkeypatch.setattr(cli.campaign, "run", lambda options, watch: summary)
    return cli.main(["fuzz"])


def test_an_interrupted_campaign_ends_with_130_unless_it_found_something(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(monkeypatch) == 0
    assert ended(monkeypatch, interrupted=True) == 130
    assert capsys.readouterr().out.splitlines()[-1].endswith("(interrupted)")
    findings = Findings()
    findings.add(helpers_failure())
    assert ended(monkeypatch, interrupted=True, findings=findings) == 1


def test_a_campaign_that_could_not_go_on_shows_what_it_had_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(monkeypatch, broken="workers keep ending") == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("4 cases, 0 findings")
    assert printed.err == "fuzz: workers keep ending\n"


def test_a_gpu_that_torch_does_not_see_stops_the_campaign(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "visible_gpus", lambda: 0)
    monkeypatch.setattr(environment, "nvidia_devices", lambda: ["/dev/nvidia0"])
    assert cli.main(["fuzz", "--target", "reference"]) == 2
    said = capsys.readouterr().err
    assert "/dev/nvidia0" in said
    assert "--device cpu" in said
    assert environment.choose_device("cpu") == "cpu"


def test_a_machine_without_a_gpu_is_fuzzed_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "visible_gpus", lambda: 0)
    monkeypatch.setattr(environment, "nvidia_devices", list)
    assert environment.choose_device(None) == "cpu"
    with pytest.raises(environment.NoDevice, match="there is no NVIDIA device"):
        environment.choose_device("cuda")


def test_a_gpu_that_torch_sees_is_used_unless_the_cpu_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "visible_gpus", lambda: 2)
    assert [environment.choose_device(asked) for asked in (None, "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


@pytest.mark.parametrize(("held", "device"), [(None, "cpu"), ("0", "cpu"), ("1", "cuda"), (None, "cuda")])
def test_workers_start_with_the_interpreter_on_a_cpu_only(
    held: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    if held is not None:
        monkeypatch.setenv("TRITON_INTERPRET", held)
    with environment.variables_for(device):
        assert environment.os.environ.get("TRITON_INTERPRET") == ("1" if device == "cpu" else None)
    assert environment.os.environ.get("TRITON_INTERPRET") == held


def counted() -> Summary:
    summary = Summary(options=Options(), device="cpu", workers=2, versions={"torch": "2"}, seconds=10.0)
    summary.feasible = frozenset(
        {frozenset({("alibi", True), ("sinks", True)}), frozenset({("alibi", True), ("sinks", False)})}
    )
    for seed in range(4):
        case = CASE.with_spec(alibi=True, sinks=True).with_batch(query_lens=(1,), seq_lens=(1024 + seed,))
        summary.tally.add(helpers.agreeing(case, helpers.Fake(), "cpu"), MODEL)
    return summary


def test_the_closing_line_counts() -> None:
    summary = counted()
    assert report.closing_line(summary) == (
        "4 cases, 0 findings, 10.0 s, 0.4 cases/s; median 1 tokens, 1,025 keys, 100% >= 1024 keys; 1 compile keys; "
        "pairs 1/2; worst observed/bound out 0.00 (bfloat16) lse 0.00"
    )
    summary.findings.add(helpers_failure())
    summary.tally.declined["no"] = 3
    line = report.closing_line(summary)
    assert "1 finding, " in line
    assert "3 more declined" in line
    summary.tally.not_judged["no memory"] = 2
    assert "; 2 more not judged" in report.closing_line(summary)
    assert "\nnot judged: 2 x no memory\n" in report.closing(summary)
    body = json.loads(report.to_json(summary))
    assert (body["cases"], body["not_judged"]) == (4, {"no memory": 2})


def test_what_a_target_never_accepts_is_named_once_and_no_missing_pair() -> None:
    summary = counted()
    summary.tally.declined["attention only"] = 3
    summary.banned = frozenset({("operation", "merge_states"), ("nope_head_size", 32), ("sinks", False)})
    summary.banned |= frozenset({("nope_head_size", value) for value in (128, 64, 80)})
    shown = report.closing(summary)
    left_out = "nope_head_size (all), operation=merge_states, sinks=False"
    assert f"\nnever accepted, and so left out: {left_out}\n" in shown
    assert "NOT ALL PAIRS" not in shown
    summary.banned = frozenset()
    assert "NOT ALL PAIRS of features were covered: 1 are missing" in report.closing(summary)


def test_no_more_findings_are_printed_than_one_can_read() -> None:
    summary = counted()
    features = {"alibi": True, "sinks": True, "softcap": 2.0, "sliding_window": 4, "odd_strides": True}
    features |= {"cache_layout": "HND", "causal": False}
    for pair in itertools.combinations(features.items(), 2):  # none has all the features of another
        summary.findings.add(helpers_failure(**dict(pair)))
    assert len(summary.findings) == report.SHOWN_FINDINGS + 1
    shown = report.closing(summary)
    assert shown.count(" replay ") == report.SHOWN_FINDINGS
    assert "\n... and 1 more in findings\n" in shown


def helpers_failure(**spec: object) -> Failure:
    return Failure.of(helpers.differs(CASE.with_spec(**spec)))


def test_plain_progress_says_everything_once_and_the_status_now_and_then() -> None:
    stream = io.StringIO()
    summary = counted()
    with progress.make(stream) as watch:
        watch(summary)
        summary.notes = ("a note",)
        watch(summary)
        summary.rows = 3
        watch(summary)
        watch(summary)
    lines = stream.getvalue().splitlines()
    assert lines[-2:] == ["a note", f"modes: {', '.join(MODES)}"]
    assert [line for line in lines if line.startswith("fuzz: ")] == lines[:1]
    assert lines.count("a note") == 1
    stream = io.StringIO()
    plain = progress.Plain(stream, seconds=0.0)
    plain(summary)
    assert "4 cases, 0.4/s" in stream.getvalue()


def test_a_terminal_gets_one_live_line() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress.make(stream) as watch:
        watch(counted())
    assert "4 cases" in stream.getvalue()


def test_a_campaign_has_a_worker_per_core_and_on_gpus_half_as_many_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(24))
    assert runner.workers(Options(), 0) == 24
    assert runner.workers(Options(), 1) == 24
    assert runner.workers(Options(), 2) == 36
    assert runner.workers(Options(workers=3), 1) == 3


def test_fuzz_wants_a_file_for_its_summary_and_a_folder_for_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["fuzz", "--device", "cpu", "--json", str(tmp_path)]) == 2
    assert "expected a file" in capsys.readouterr().err
    assert cli.main(["fuzz", "--device", "cpu", "--findings", str(tmp_path / "file")]) == 2
    assert "expected a folder" in capsys.readouterr().err
    assert cli.main(["fuzz", "--device", "cpu", "--past", str(tmp_path / "nowhere")]) == 2
    assert "--past: there is no folder" in capsys.readouterr().err


def test_a_window_is_a_feature_at_any_width() -> None:
    for width in (3, 5, 20, 47, 200):
        assert "sliding_window" in features_on(Case(spec=Spec(sliding_window=width)))
    assert features_on(Case()) == frozenset()
