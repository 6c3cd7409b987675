"""Memory under the emulation: addresses are kept and tensors are not, and a pool gives dead memory out again."""

from __future__ import annotations

import pytest
import torch

from pageproof.oracle.execution.graphs.emulation import EmulatedBackend
from pageproof.oracle.execution.graphs.errors import CaptureError, DanglingPointer
from pageproof.oracle.execution.graphs.interface import capture


@pytest.fixture
def backend() -> EmulatedBackend:
    return EmulatedBackend()


def test_a_pinned_copy_keeps_the_address_and_has_to_be_asynchronous(backend: EmulatedBackend) -> None:
    staging, target = backend.pinned(torch.tensor([1, 2])), torch.zeros(2, dtype=torch.int64)
    with capture(backend, backend.new_pool()) as graph:
        target.copy_(staging, non_blocking=True)
    staging.fill_(5)
    graph.replay()
    assert target.tolist() == [5, 5]
    with pytest.raises(CaptureError, match="non_blocking"), capture(backend, backend.new_pool()):
        target.copy_(staging)
    del staging
    with pytest.raises(DanglingPointer, match=r"aten::copy_"):
        graph.replay()


def test_freed_and_moved_memory_is_dangling(backend: EmulatedBackend) -> None:
    freed, moved, out = torch.ones(4), torch.ones(4), torch.zeros(4)
    with capture(backend, backend.new_pool()) as graph:
        torch.mul(freed, 2.0, out=out)
    with capture(backend, backend.new_pool()) as other:
        out.copy_(moved)
    freed, kept = torch.ones(4), freed[2:]
    graph.replay()
    del kept
    with pytest.raises(DanglingPointer, match=r"aten::mul\.out"):
        graph.replay()
    moved.resize_(1000)
    with pytest.raises(DanglingPointer, match=r"aten::copy_"):
        other.replay()
    assert (graph.replays, other.replays) == (1, 0)


def test_dead_memory_of_a_pool_is_taken_again(backend: EmulatedBackend) -> None:
    pool, x = backend.new_pool(), torch.ones(1000)
    with capture(backend, pool):
        first = x + 1.0
        address = first.data_ptr()
        kept = x + 2.0
        del first
        again = x[:10] + 3.0
    assert again.data_ptr() == address != kept.data_ptr()
    with capture(backend, pool):
        later = x + 4.0
    assert later.data_ptr() not in (address, kept.data_ptr())
    del again
    with capture(backend, pool):
        assert (x[:50] + 5.0).data_ptr() == address
    with capture(backend, backend.new_pool()):
        assert (x + 6.0).data_ptr() not in (address, kept.data_ptr(), later.data_ptr())


def test_another_pools_memory_is_valid_as_long_as_that_pool(backend: EmulatedBackend) -> None:
    pool, x = backend.new_pool(), torch.ones(4)
    with capture(backend, pool) as first:
        between = x + 1.0
    with capture(backend, backend.new_pool()) as second:
        result = between * 2.0
    del between
    first.replay()
    second.replay()
    assert result.tolist() == [4.0] * 4
    first.release()
    del first, pool
    with pytest.raises(DanglingPointer, match=r"aten::mul"):
        second.replay()
