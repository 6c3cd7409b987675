"""The backends that a test of captured graphs is asked of: the emulation, and CUDA graphs where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from pageproof.optimized import interpreter
from pageproof.oracle.execution.graphs.cuda import CudaBackend
from pageproof.oracle.execution.graphs.emulation import EmulatedBackend

_cuda = pytest.param(CudaBackend, id="cuda", marks=pytest.mark.gpu)
_interpreted = pytest.mark.skipif(not interpreter.INTERPRETED, reason="kernels are compiled here, not interpreted")

BACKENDS = [pytest.param(EmulatedBackend, id="emulation"), _cuda]
KERNEL_BACKENDS = [pytest.param(EmulatedBackend, id="emulation", marks=_interpreted), _cuda]
DEVICES = [pytest.param("cpu", marks=_interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]


def is_capturing() -> bool:
    """Whether a graph is being captured in this thread, or a step traced by the compiler."""
    if torch.compiler.is_compiling():  # asked first: a trace does not get past the others
        return True
    on_gpu = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return on_gpu or EmulatedBackend().is_capturing()
