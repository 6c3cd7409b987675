"""What fails in a breakable capture or replay is named, and leaves nothing behind."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from pageproof.oracle.execution.graphs.breakable import BreakableGraph, eager_break
from pageproof.oracle.execution.graphs.cuda import CudaBackend
from pageproof.oracle.execution.graphs.errors import ReplayError
from pageproof.oracle.execution.graphs.interface import Backend

from .graph_backends import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    made: Backend = request.param()
    return made


class Step:
    """Two breaks; fails where it is told to, and counts in memory that its end puts back to zero."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.fails_at = backend, ""
        self.x = torch.ones(4, device=backend.device)
        self.counter = torch.zeros(4, device=backend.device)

    def fail(self, place: str) -> None:
        if self.fails_at == place:
            raise ValueError(f"failed at {place}")

    @eager_break(name="first attention")
    def first(self, y: Tensor) -> Tensor:
        self.fail("first")
        return y + float(y.sum())

    @eager_break(name="second attention")
    def second(self, y: Tensor) -> Tensor:
        self.fail("second")
        return y * float(self.counter[0])

    def __call__(self) -> Tensor:
        self.counter.zero_()
        hidden = self.first(self.x * 2.0)
        self.fail("middle")
        self.counter.add_(1.0)
        hidden = self.second(hidden + 1.0)
        self.fail("end")
        return hidden + 1.0


NOTES = {"first": "in break 1 .*first attention", "second": "in break 2 .*second attention"}


@pytest.mark.parametrize("place", ["first", "middle", "second", "end"])
def test_a_failed_capture_leaves_nothing_behind(backend: Backend, place: str) -> None:
    """What was raised comes through as it is, with where it happened; the same pool is captured into again."""
    pool, step = backend.new_pool(), Step(backend)
    step()
    expected = step().tolist()
    graph = BreakableGraph(backend, pool)
    step.fails_at = place
    with pytest.raises(ValueError, match=f"failed at {place}") as caught:
        graph.capture(step)
    assert "a breakable capture was given up in segment" in caught.value.__notes__[-1]
    if place in NOTES:
        with pytest.raises(ValueError, match=NOTES[place]):
            raise caught.value
    assert not backend.is_capturing()
    assert (graph.segments, graph.breaks) == (0, 0)
    with pytest.raises(ReplayError, match="never ended"):
        graph.replay()
    step.fails_at = ""
    assert step().tolist() == expected  # nothing is captured any more
    for again in (graph, BreakableGraph(backend, pool)):
        result = again.capture(step)
        again.replay()
        assert result.tolist() == expected


@pytest.mark.parametrize(("place", "named"), [("first", "break 1, first"), ("second", "break 2, second")])
def test_a_failed_replay_is_named_and_the_next_one_is_right(backend: Backend, place: str, named: str) -> None:
    step = Step(backend)
    graph = BreakableGraph(backend, backend.new_pool())
    result = graph.capture(step)
    step.fails_at = place
    with pytest.raises(ReplayError, match=f"{named} attention, of 3 segments, 2 breaks: failed at {place}") as caught:
        graph.replay()
    assert isinstance(caught.value.__cause__, ValueError)
    assert graph.replays == 0
    step.fails_at = ""
    step.x.fill_(3.0)
    graph.replay()
    assert (result.tolist(), graph.replays) == (step().tolist(), 1)


def test_a_failed_replay_puts_the_modes_back(backend: Backend) -> None:
    step = Step(backend)
    graph = BreakableGraph(backend, backend.new_pool())
    with torch.inference_mode():
        graph.capture(step)
    step.fails_at = "second"
    with pytest.raises(ReplayError):
        graph.replay()
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_a_failure_that_the_step_catches_is_captured_as_it_went(backend: Backend) -> None:
    """As where one kernel declines and the step falls back to another."""
    step, x = Step(backend), torch.ones(4, device=backend.device)
    step.fails_at = "first"

    def attend() -> Tensor:
        y = x * 2.0
        try:
            return step.first(y)
        except ValueError:
            return eager_break(torch.neg)(y + 1.0)

    graph = BreakableGraph(backend, backend.new_pool())
    result = graph.capture(lambda: attend() * 10.0)
    step.fails_at = ""
    x.fill_(3.0)
    graph.replay()
    assert result.tolist() == [-70.0] * 4
    assert (graph.segments, graph.breaks) == (3, 1)


@pytest.mark.gpu
def test_a_refused_operation_that_the_step_catches_does_not_pass() -> None:
    """CUDA has ended the capture by then, and what the step does after it would be recorded by nobody."""
    backend = CudaBackend()
    x = torch.ones(4, device=backend.device)

    def step() -> Tensor:
        y = eager_break(torch.clone)(x)
        with contextlib.suppress(RuntimeError):
            return y * float(y.sum())
        return eager_break(torch.neg)(y)

    graph = BreakableGraph(backend, backend.new_pool())
    with pytest.raises(RuntimeError):
        graph.capture(step)
    assert not backend.is_capturing()
    result = graph.capture(lambda: eager_break(torch.clone)(x) + 1.0)
    assert result.tolist() == [2.0] * 4
