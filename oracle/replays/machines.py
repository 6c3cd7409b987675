"""The backends of this process, one for each device, with a memory pool that the captures of all cases share."""

from __future__ import annotations

import functools

import torch

from ..execution.graphs.cuda import CudaBackend
from ..execution.graphs.emulation import EmulatedBackend
from ..execution.graphs.interface import Backend, Graph, capture
from ..execution.modes import Machine


def machine_of(device: torch.device, *, splits_update: bool) -> Machine:
    backend, pool, _ = _kept(str(device))
    return Machine(backend, pool, splits_update)


@functools.cache
def _kept(device: str) -> tuple[Backend, object, Graph]:
    """An empty graph holds the pool between cases, whose memory is then handed out again instead of allocated anew."""
    backend: Backend = CudaBackend(device) if device.startswith("cuda") else EmulatedBackend()
    pool = backend.new_pool()
    with capture(backend, pool) as keeper:
        pass
    return backend, pool, keeper
