"""A campaign's worker asks the driver to sleep while it waits for its GPU, where the driver can be asked."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pageproof.oracle import environment

SLEEPS = 0x04  # CU_CTX_SCHED_BLOCKING_SYNC of the CUDA driver


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What a driver is asked: (device, flags)."""
    found: list[tuple[int, int]] = []
    driver = SimpleNamespace(cuInit=lambda flags: flags, cuDevicePrimaryCtxSetFlags_v2=lambda *args: found.append(args))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda _name: driver)
    return found


def test_it_is_asked_of_the_workers_own_gpu(asked: list[tuple[int, int]]) -> None:
    environment.sleep_while_waiting(torch.device("cuda:1"))
    environment.sleep_while_waiting(torch.device("cuda"))
    assert asked == [(1, SLEEPS), (0, SLEEPS)]


def test_nothing_is_asked_for_a_cpu(asked: list[tuple[int, int]]) -> None:
    environment.sleep_while_waiting(torch.device("cpu"))
    assert not asked


def no_library(_name: str) -> Any:
    raise OSError("libcuda.so.1: cannot open shared object file")


@pytest.mark.parametrize("load", [no_library, lambda _name: SimpleNamespace(cuInit=int)], ids=["absent", "older"])
def test_a_driver_that_does_not_offer_it_stops_nobody(
    load: Callable[[str], Any], asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.ctypes, "CDLL", load)
    environment.sleep_while_waiting(torch.device("cuda:0"))
    assert not asked
