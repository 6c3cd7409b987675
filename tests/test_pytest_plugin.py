"""The pytest plugin and the settings of our own suite, each seen from a pytest run of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hypothesis import settings

DEVICE_TEST = """
import torch
torch.set_num_threads(2)
def test_device(pageproof_device):
    print("DEVICE", pageproof_device, "THREADS", torch.get_num_threads())
"""
JUDGE_TEST = "import pageproof.oracle.judging" + DEVICE_TEST


def run_pytest(folder: Path, source: str, *options: str, **environment: str) -> str:
    """Everything that pytest prints over one test file that lies outside of this repository."""
    (folder / "test_inner.py").write_text(source)
    (folder / "pytest.ini").write_text("[pytest]\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "OMP_"))}
    command = [sys.executable, "-m", "pytest", "-p", "pageproof.oracle.pytest_plugin", "-s", *options]
    done = subprocess.run(
        command, cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout + done.stderr


def test_the_cpu_can_be_asked_for(tmp_path: Path) -> None:
    assert "DEVICE cpu" in run_pytest(tmp_path, DEVICE_TEST, "--pageproof-device", "cpu")


def test_no_gpu_is_an_error_where_one_is_asked_for(tmp_path: Path) -> None:
    output = run_pytest(tmp_path, DEVICE_TEST, "--pageproof-device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert "--pageproof-device cuda: " in output
    assert "; --pageproof-device cpu goes on without one" in output
    assert " --device" not in output
    assert "1 error in" in output


# The variable makes a worker here: what a worker of xdist's own prints is lost.
def test_a_worker_that_judges_takes_one_thread(tmp_path: Path) -> None:
    assert "THREADS 1\n" in run_pytest(tmp_path, JUDGE_TEST, PYTEST_XDIST_WORKER="gw0")


def test_a_worker_that_was_told_its_threads_keeps_them(tmp_path: Path) -> None:
    assert "THREADS 2\n" in run_pytest(tmp_path, JUDGE_TEST, PYTEST_XDIST_WORKER="gw0", OMP_NUM_THREADS="2")


def test_a_worker_that_does_not_judge_keeps_its_threads(tmp_path: Path) -> None:
    assert "THREADS 2\n" in run_pytest(tmp_path, DEVICE_TEST, PYTEST_XDIST_WORKER="gw0")


def test_our_profiles_do_not_depend_on_where_they_run() -> None:
    for name in ("ci", "thorough"):
        profile = settings.get_profile(name)
        assert profile.deadline is None
        assert profile.print_blob
    assert settings.get_profile("ci").derandomize
    assert settings.get_profile("ci").database is None
    assert not settings.get_profile("thorough").derandomize
    assert settings.get_profile("thorough").database is not None
