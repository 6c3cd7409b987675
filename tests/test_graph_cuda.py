"""CUDA graphs behind the same interface: what happened is counted, and a capture can be left, ended and forked."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pageproof.oracle.execution.graphs.cuda import CudaBackend
from pageproof.oracle.execution.graphs.errors import CaptureError, ReplayError
from pageproof.oracle.execution.graphs.interface import capture

pytestmark = pytest.mark.gpu


@pytest.fixture
def backend() -> CudaBackend:
    return CudaBackend()


def test_nodes_and_replays_are_counted(backend: CudaBackend) -> None:
    x = torch.ones(4, device="cuda")
    backend.warm_up(lambda: (x * 2.0).add_(1.0))
    with capture(backend, backend.new_pool()) as graph:
        result = (x * 2.0).add_(1.0)
        with pytest.raises(CaptureError):
            _ = graph.num_nodes
    for value in (3.0, 4.0):
        x.fill_(value)
        graph.replay()
        assert result.tolist() == [2.0 * value + 1.0] * 4
    assert (graph.num_nodes, graph.replays) == (2, 2)
    graph.release()
    graph.release()
    with pytest.raises(ReplayError):
        graph.replay()


def test_a_graph_that_died_in_a_cycle_does_not_end_another_capture(backend: CudaBackend) -> None:
    x = torch.ones(4, device="cuda")
    gc.collect()
    with capture(backend, backend.new_pool()) as dead:
        x.clone()
    cycle: list[object] = [dead]
    cycle.append(cycle)
    with capture(backend, backend.new_pool()) as graph:
        del dead, cycle
        garbage = [[object()] for _ in range(100_000)]  # enough for a collection
        result = x * 2.0
    assert gc.isenabled()
    del garbage
    graph.replay()
    assert result.tolist() == [2.0] * 4


def test_an_empty_segment_is_a_graph(backend: CudaBackend) -> None:
    with capture(backend, backend.new_pool()) as graph:
        pass
    graph.replay()
    assert (graph.num_nodes, graph.replays) == (0, 1)


def test_segments_of_one_pool_around_eager_work(backend: CudaBackend) -> None:
    pool, x = backend.new_pool(), torch.zeros(4, device="cuda")
    head = backend.begin(pool)
    doubled = x * 2.0
    head.end()
    broken = torch.empty_like(doubled)
    tail = backend.begin(pool)
    result = broken + 1.0
    tail.end()
    for value in (1.0, 2.0):
        x.fill_(value)
        head.replay()
        broken.copy_(doubled * 10.0)
        tail.replay()
        assert result.tolist() == [20.0 * value + 1.0] * 4


def test_a_joined_branch_is_part_of_the_graph(backend: CudaBackend) -> None:
    x = torch.ones(4, device="cuda")
    with capture(backend, backend.new_pool()) as graph:
        forks = [backend.fork(), backend.fork()]
        with forks[0]:
            left = x * 2.0
        with forks[1]:
            right = x * 3.0
        backend.join_branches()
        result = left + right
    x.fill_(2.0)
    graph.replay()
    assert result.tolist() == [10.0] * 4
    assert graph.num_nodes >= 3


def test_a_branch_left_open_is_refused_and_leaves_nothing_behind(backend: CudaBackend) -> None:
    pool, x = backend.new_pool(), torch.ones(4, device="cuda")

    def leave_a_branch() -> None:
        with backend.fork():
            x.mul_(2.0)

    with pytest.raises(CaptureError, match="1 of its branches"), capture(backend, pool):
        leave_a_branch()
    assert not backend.is_capturing()
    with capture(backend, pool) as graph:
        result = x + 1.0
    graph.replay()
    assert result.tolist() == [2.0] * 4


def give_up(x: Tensor) -> None:
    raise RuntimeError("the step gives up")


REFUSED: dict[str, Callable[[Tensor], object]] = {
    "waits": lambda x: (x + 1.0).sum().item(),
    "pageable": lambda x: (x + 1.0).copy_(torch.zeros(4), non_blocking=True),
    "raises": give_up,
}


@pytest.mark.parametrize("work", REFUSED.values(), ids=REFUSED)
def test_a_refused_capture_gives_everything_back(backend: CudaBackend, work: Callable[[Tensor], object]) -> None:
    """The pool, the allocator and torch's random numbers."""
    pool, x = backend.new_pool(), torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError), capture(backend, pool):
        work(x)
    assert not backend.is_capturing()
    torch.cuda.empty_cache()
    assert bool(torch.rand(4, device="cuda").isfinite().all())
    with capture(backend, pool) as graph:
        result = x + torch.rand(4, device="cuda")
    graph.replay()
    first = result.clone()
    graph.replay()
    assert not first.equal(result)


def test_other_threads_go_on_while_one_captures(backend: CudaBackend) -> None:
    computed: list[list[float]] = []

    def work() -> None:
        computed.append((torch.ones(2, device="cuda") + 1.0).tolist())
        assert not backend.is_capturing()

    with capture(backend, backend.new_pool()) as graph:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        with pytest.raises(CaptureError, match="inside of another"):
            backend.begin(backend.new_pool())
        with pytest.raises(ReplayError):
            graph.replay()
    assert computed == [[2.0, 2.0]]
    assert graph.num_nodes == 0


def test_a_pinned_copy_keeps_the_address(backend: CudaBackend) -> None:
    staging, target = backend.pinned(torch.tensor([1, 2])), torch.zeros(2, dtype=torch.int64, device="cuda")
    with capture(backend, backend.new_pool()) as graph:
        target.copy_(staging, non_blocking=True)
    staging.fill_(5)
    graph.replay()
    assert target.tolist() == [5, 5]
