"""The backends that a test of captured graphs is asked of: the emulation, and CUDA graphs where there is a GPU."""

from __future__ import annotations

import pytest

from pageproof.optimized import interpreter
from pageproof.oracle.execution.graphs.cuda import CudaBackend
from pageproof.oracle.execution.graphs.emulation import EmulatedBackend

_cuda = pytest.param(CudaBackend, id="cuda", marks=pytest.mark.gpu)
_interpreted = pytest.mark.skipif(not interpreter.INTERPRETED, reason="kernels are compiled here, not interpreted")

BACKENDS = [pytest.param(EmulatedBackend, id="emulation"), _cuda]
KERNEL_BACKENDS = [pytest.param(EmulatedBackend, id="emulation", marks=_interpreted), _cuda]
