"""What has to hold before a test is imported: where the packages are, how Triton runs, what Hypothesis does."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

ROOT = Path(__file__).resolve().parent
CHECKOUT = str(ROOT / "tests" / "checkout")

if "PYTHONPATH" in os.environ:  # tests start processes in other folders, where a relative path leads elsewhere
    entries = os.environ["PYTHONPATH"].split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in entries)

if find_spec("pageproof") is None:  # a plain checkout: nothing is installed
    sys.path.append(CHECKOUT)
    inherited = os.environ.get("PYTHONPATH")  # what a test starts as a process has to find them too
    os.environ["PYTHONPATH"] = f"{inherited}{os.pathsep}{CHECKOUT}" if inherited else CHECKOUT

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per worker; read by torch, and by processes that a test starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Installed, the plugin has been loaded by its entry point of the same name, and pytest skips it here.
pytest_plugins = ["pageproof.oracle.pytest_plugin"]

# Under CI Hypothesis loads a profile of its own. Ours leave nothing to inherit from it.
settings.register_profile(
    "ci",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    phases=tuple(Phase),
    suppress_health_check=[HealthCheck.too_slow],
    stateful_step_count=20,
    report_multiple_bugs=False,
)
settings.register_profile(
    "thorough",
    parent=settings.get_profile("ci"),
    max_examples=1000,
    derandomize=False,
    database=DirectoryBasedExampleDatabase(ROOT / ".hypothesis" / "examples"),
)
settings.load_profile("ci")  # --hypothesis-profile overrules it


def pytest_configure(config: pytest.Config) -> None:
    # Triton reads this when it is imported, so it is set before the first test module is.
    if _device(config) == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header(config: pytest.Config) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "numpy"))
    return f"pageproof: {_device(config)}, {versions}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _device(config) == "cuda":
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and this run has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _device(config: pytest.Config) -> str:
    from pageproof.oracle.pytest_plugin import chosen_device

    return chosen_device(config)
