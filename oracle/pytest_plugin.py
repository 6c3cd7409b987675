"""The pytest plugin: which device the oracle uses, and one torch thread in each pytest-xdist worker.

pytest loads it wherever the package is installed, so it imports no torch while it loads and changes nothing
for tests that do not use the oracle.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("pageproof").addoption(
        "--pageproof-device",
        choices=DEVICES,
        default="auto",
        help="where the oracle runs its cases: auto (the default) takes a CUDA GPU where there is one; "
        "cuda makes it an error to have none, and cpu leaves it alone",
    )


def pytest_collection_finish() -> None:
    """Keep the workers of pytest-xdist from taking every core each, unless OMP_NUM_THREADS says what to do."""
    uses_oracle = "torch" in sys.modules and "pageproof.oracle.judging" in sys.modules
    if uses_oracle and "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pageproof_device(pytestconfig: pytest.Config) -> torch.device:
    """The device that --pageproof-device names."""
    import torch

    return torch.device(chosen_device(pytestconfig))


def chosen_device(config: pytest.Config) -> str:
    """ "cpu" or "cuda", as --pageproof-device says; a UsageError where it says what this machine cannot do."""
    from .environment import NoDevice, choose_device

    asked = config.getoption("--pageproof-device")
    try:
        return choose_device(None if asked == "auto" else asked)
    except NoDevice as error:
        remedy = "--pageproof-device cpu goes on without one"
        raise pytest.UsageError(f"--pageproof-device {asked}: {error}; {remedy}") from error
