"""Faults that engines have around captured graphs: all show on a GPU, the emulated ones on a CPU too."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pageproof.optimized import interpreter
from pageproof.oracle.execution.graphs.cuda import CudaBackend
from pageproof.oracle.execution.graphs.emulation import EmulatedBackend
from pageproof.oracle.execution.graphs.interface import Backend

from . import graph_faults as faults
from .graph_engine import Engine, what_shows

# What shows of each fault: in the emulation, and with CUDA graphs.
FAULTS = {
    faults.LateMetadata: ("differs", "differs"),
    faults.PlanInWarmUp: ("differs", "differs"),
    faults.Reallocated: ("dangling", "differs"),
    faults.FrozenNumber: ("differs", "differs"),
    faults.FrozenGrid: ("differs", "differs"),
    faults.RecycledStaging: ("differs", "differs"),
    faults.StalePadding: ("differs", "differs"),
    faults.SharedPool: ("differs", "differs"),
    faults.FailedReplay: ("differs", "differs"),
    faults.HostSync: ("refused", "refused"),
    faults.TunedInCapture: ("declined", "refused"),
    faults.UnjoinedStream: ("declined", "refused"),
}

interpreted = pytest.mark.skipif(not interpreter.INTERPRETED, reason="kernels are compiled here, not interpreted")
BACKENDS = [
    pytest.param(EmulatedBackend, 0, id="emulation", marks=interpreted),
    pytest.param(CudaBackend, 1, id="cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("make", "column"), BACKENDS)
@pytest.mark.parametrize("engine", FAULTS, ids=lambda engine: engine.__name__)
def test_the_fault_shows(engine: type[Engine], make: Callable[[], Backend], column: int) -> None:
    assert what_shows(engine, make(), faulty=True) == FAULTS[engine][column]


@pytest.mark.parametrize(("make", "column"), BACKENDS)
@pytest.mark.parametrize("engine", FAULTS, ids=lambda engine: engine.__name__)
def test_its_healthy_twin_does_not(engine: type[Engine], make: Callable[[], Backend], column: int) -> None:
    declined = column == 0 and engine is faults.UnjoinedStream  # joined or not, there are no streams
    assert what_shows(engine, make(), faulty=False) == ("declined" if declined else None)


@pytest.mark.parametrize(("make", "column"), BACKENDS)
def test_a_refused_capture_leaves_nothing_behind(make: Callable[[], Backend], column: int) -> None:
    """The same backend captures and replays rightly after it refused: in this process, and in the same pool."""
    backend = make()
    for engine in (faults.HostSync, faults.UnjoinedStream, faults.TunedInCapture):
        assert what_shows(engine, backend, faulty=True) == FAULTS[engine][column]
        assert not backend.is_capturing()
    refused = faults.HostSync(backend, faulty=True)
    with pytest.raises(RuntimeError):
        refused.prepare()
    refused.faulty = False
    refused.prepare()
    eager = faults.HostSync(backend, faulty=False)
    assert refused.run([5, 9])[0].equal(eager.run_eagerly([5, 9])[0])
