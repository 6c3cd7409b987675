"""`fuzz` sees every seeded bug, and sees it soon."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from pageproof.oracle import environment
from pageproof.oracle.environment import Unusable
from pageproof.oracle.mutants import hunt, loading
from pageproof.oracle.mutants.__main__ import main
from pageproof.oracle.mutants.catalogue import MUTANTS, Mutant, find
from pageproof.oracle.mutants.loading import apply

OPTIMIZED = Path(__file__).resolve().parents[1] / "optimized"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_fuzz_finds_it(mutant: Mutant) -> None:
    command = [sys.executable, "-m", "pageproof.oracle.mutants", mutant.name, "--device", "cpu", "--limit", "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "found 1 of 1 mutants" in done.stdout
    assert mutant.story in done.stdout


def test_a_kernel_without_a_fault_is_not_found(monkeypatch: pytest.MonkeyPatch, pageproof_device: torch.device) -> None:
    """The hunt can fail: an unchanged copy of the kernels goes through it."""
    same = Mutant("same", "plan.py", "LARGEST_SEQ_LEN = ", "LARGEST_SEQ_LEN = ", "")
    monkeypatch.setattr(loading, "find", lambda name: same)
    steps = list(hunt.hunt("same", seed=0, limit=4, device=pageproof_device.type))
    assert [step.case for step in steps] == [1, 2, 3, 4, 4]
    assert steps[-1] == hunt.Step(4, is_over=True)


def test_a_hunt_that_never_starts_finds_nothing() -> None:
    with pytest.raises(Unusable, match=r"^the hunt for nobody ended before its first case \(exit status 1\)$"):
        hunt.hunt_apart("nobody", seed=0, limit=3, device="cpu")


def hangs_at_its_second_case(sender: Connection) -> None:
    for case in (1, 2):
        sender.send(hunt.Step(case))
    time.sleep(600)


def dies_at_its_first_case(sender: Connection) -> None:
    sender.send(hunt.Step(1))
    os._exit(3)


@pytest.mark.parametrize(
    ("hunter", "end"),
    [
        (hangs_at_its_second_case, hunt.Step(2, "timed-out", is_over=True)),
        (dies_at_its_first_case, hunt.Step(1, "crashed", is_over=True)),
    ],
)
def test_a_fault_that_ends_or_holds_its_process_is_found(hunter: Callable[..., None], end: hunt.Step) -> None:
    assert hunt.watch("it", hunter, (), seconds=1.0) == end


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nobody"], "found 'nobody', expected one of"), (["--device", "cuda"], "--device cpu goes on without one")],
)
def test_nothing_to_hunt_ends_with_2(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "visible_gpus", lambda: 0)
    monkeypatch.setattr(environment, "nvidia_devices", list)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))  # restores what a hunt sets
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--limit", "0"], ["--limit", "x"], ["--seed", "-1"]])
def test_wrong_usage_ends_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(flags)


def test_there_are_ten_of_them_with_names_of_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 10


def test_a_mutant_that_no_longer_fits_the_source_is_an_error(tmp_path: Path) -> None:
    gone = Mutant("gone", "plan.py", "text that is not there", "", "")
    (tmp_path / "plan.py").write_text((OPTIMIZED / "plan.py").read_text())
    with pytest.raises(ValueError, match=r"^mutant gone: found its text 0 times in plan\.py, expected once$"):
        apply(gone, tmp_path)
    with pytest.raises(ValueError, match=r"^mutant: found 'gone', expected one of window_off_by_one, "):
        find("gone")
