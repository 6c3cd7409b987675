"""The command line names execution modes, and replays cases that are in one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pageproof.oracle import cli
from pageproof.oracle.case import MODES, BatchShape, Case, Spec

from .campaign_helpers import FEW

SPEC = Spec(dtype="float16", num_kv_heads=1, head_size=16, head_size_v=16)
CASE = Case(spec=SPEC, batch=BatchShape(query_lens=(1, 2), seq_lens=(3, 4)))


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # restores what --in-process sets


def replay(*arguments: str) -> int:
    return cli.main(["replay", *arguments, "--device", "cpu"])


@pytest.mark.parametrize("named", ["graph", "full,", ""])
def test_a_mode_that_there_is_not_is_wrong_usage(named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fuzz", "--modes", named])
    assert stopped.value.code == 2
    assert "expected all, or some of eager, full" in capsys.readouterr().err


def test_fuzz_and_replay_in_a_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = tmp_path / "summary.json"
    flags = ["--modes", "full", *FEW, "--cases", "2", "--json", str(summary)]
    assert cli.main(["fuzz", *flags, "--findings", str(tmp_path / "findings")]) == 0
    assert "modes, what really ran: full 6 replays" in capsys.readouterr().out
    body = json.loads(summary.read_text())
    assert body["modes"] == {"full": {"cases": 2, "replays": 6}}
    assert [name for name, cases in body["values"]["mode"].items() if cases] == ["full"]
    case = tmp_path / "case.json"
    case.write_text(replace(CASE, mode="full").to_json())
    assert replay(str(case), "--target", "reference", "--in-process") == 125  # it offers plain calls only
    assert replay(str(case)) == 0
    assert "ours: agrees" in capsys.readouterr().out


def test_all_modes_are_drawn_unless_some_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = tmp_path / "summary.json"
    flags = [*FEW, "--cases", "12", "--json", str(summary)]
    assert cli.main(["fuzz", *flags, "--findings", str(tmp_path / "findings")]) == 0
    modes = json.loads(summary.read_text())["modes"]
    assert list(modes) == list(MODES)
    assert sum(mode["cases"] for mode in modes.values()) == 12
    dispatched = modes["full_and_piecewise"]
    assert dispatched["cases"] >= 1
    steps = dispatched["full replays"] + dispatched["piecewise replays"] // 2
    assert steps == 3 * dispatched["cases"]
    assert dispatched["recompilations"] == 0
    printed = capsys.readouterr().out
    assert f"\nmodes: {', '.join(MODES)}\n" in printed
    assert ", full_and_piecewise " in printed


def test_a_case_in_the_dispatching_mode_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = tmp_path / "case.json"
    case.write_text(replace(CASE, mode="full_and_piecewise").to_json())
    assert '"mode": "full_and_piecewise"' in case.read_text()
    assert replay(str(case)) == 0
    assert "ours: agrees" in capsys.readouterr().out
