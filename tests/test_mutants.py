"""`fuzz` sees every seeded bug, and sees it soon."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pageproof.oracle.mutants import hunt, loading
from pageproof.oracle.mutants.catalogue import MUTANTS, Mutant, find
from pageproof.oracle.mutants.loading import apply

OPTIMIZED = Path(__file__).resolve().parents[1] / "optimized"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_fuzz_finds_it(mutant: Mutant) -> None:
    command = [sys.executable, "-m", "pageproof.oracle.mutants", mutant.name, "--device", "cpu", "--limit", "100"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "found 1 of 1 mutants" in done.stdout


def test_a_kernel_without_a_fault_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hunt can fail: an unchanged copy of the kernels goes through it."""
    same = Mutant("same", "plan.py", "LARGEST_SEQ_LEN = 2**30 - 1", "LARGEST_SEQ_LEN = 2**30 - 1", "")
    monkeypatch.setattr(loading, "find", lambda name: same)
    steps = list(hunt.hunt("same", seed=0, limit=4, device="cpu"))
    assert [step.case for step in steps] == [1, 2, 3, 4, 4]
    assert steps[-1] == hunt.Step(4, is_over=True)


def test_a_hunt_that_never_starts_finds_nothing() -> None:
    with pytest.raises(RuntimeError, match=r"^the hunt for nobody ended before its first case \(exit status 1\)$"):
        hunt.hunt_apart("nobody", seed=0, limit=3, device="cpu")


def test_there_are_ten_of_them_with_names_of_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 10


def test_a_mutant_that_no_longer_fits_the_source_is_an_error(tmp_path: Path) -> None:
    gone = Mutant("gone", "plan.py", "text that is not there", "", "")
    (tmp_path / "plan.py").write_text((OPTIMIZED / "plan.py").read_text())
    with pytest.raises(ValueError, match=r"^mutant gone: found its text 0 times in plan\.py, expected once$"):
        apply(gone, tmp_path)
    with pytest.raises(ValueError, match=r"^mutant: found 'gone', expected one of window_off_by_one, "):
        find("gone")
