"""A breakable capture: what runs between its segments, when a function breaks it, and what it refuses."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pageproof.oracle.execution.graphs.breakable import BreakableGraph, eager_break
from pageproof.oracle.execution.graphs.cuda import CudaBackend
from pageproof.oracle.execution.graphs.emulation import EmulatedBackend
from pageproof.oracle.execution.graphs.errors import CaptureError, NotEmulated, ReplayError
from pageproof.oracle.execution.graphs.interface import Backend, capture

from .graph_backends import BACKENDS, KERNEL_BACKENDS
from .graph_engine import STEPS, Engine, churn


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    made: Backend = request.param()
    return made


@pytest.fixture
def graph(backend: Backend) -> BreakableGraph:
    return BreakableGraph(backend, backend.new_pool())


@eager_break
def multiply_on_host(x: Tensor, *, factor: int = 10) -> Tensor:
    return torch.full_like(x, factor * int(x.sum()))  # no capture could do this


class Layer:
    """A method that breaks, with metadata that every step replaces."""

    def __init__(self, live: int) -> None:
        self.live = live

    @eager_break(name="the layer's attention")
    def attend(self, x: Tensor) -> Tensor:
        return torch.where(torch.arange(4, device=x.device) < self.live, x, 0.0)


def test_a_call_gets_the_values_of_its_segment_and_runs_again_at_each_replay(
    backend: Backend, graph: BreakableGraph
) -> None:
    x = torch.ones(4, device=backend.device)

    def step(bias: float) -> Tensor:
        hidden = multiply_on_host(x * 2.0, factor=3) + bias
        return multiply_on_host(hidden).add_(1.0)

    backend.warm_up(lambda: step(0.5))
    result = graph.capture(step, 0.5)
    assert result.equal(step(0.5))  # a capture is one whole step
    for value in (2.0, 3.0):
        x.fill_(value)
        graph.replay()
        assert result.equal(step(0.5))
    assert (graph.segments, graph.breaks, graph.replays) == (3, 2, 2)
    assert graph.num_nodes == 3


def test_a_method_breaks_and_reads_the_metadata_of_the_step(backend: Backend, graph: BreakableGraph) -> None:
    x, layer = torch.ones(4, device=backend.device), Layer(4)
    with graph.record() as recorded:
        result = layer.attend(x * 2.0) + 1.0
    assert recorded is graph
    for live in (1, 3):
        layer.live = live
        graph.replay()
        assert result.tolist() == [3.0] * live + [1.0] * (4 - live)
    assert Layer.attend.__name__ == "attend"


def test_elsewhere_a_broken_function_is_just_called(backend: Backend) -> None:
    x, layer, called = torch.ones(4, device=backend.device), Layer(4), []

    @eager_break
    def note(y: Tensor) -> Tensor:
        called.append(1)
        return y + 1.0

    assert layer.attend(x) is not None
    backend.warm_up(lambda: note(x))
    with capture(backend, backend.new_pool()) as whole:  # a capture that is not breakable takes it in
        result = note(x)
    whole.replay()
    assert (len(called), whole.num_nodes, result.tolist()) == (2, 1, [2.0] * 4)


def test_a_broken_function_inside_of_another_is_just_called(backend: Backend, graph: BreakableGraph) -> None:
    x = torch.ones(4, device=backend.device)

    @eager_break
    def outer(y: Tensor) -> Tensor:
        return multiply_on_host(y) + multiply_on_host(y)

    result = graph.capture(lambda: outer(x * 2.0) + 1.0)
    x.fill_(2.0)
    graph.replay()
    assert result.tolist() == [2 * 10 * 16.0 + 1.0] * 4
    assert (graph.segments, graph.breaks) == (2, 1)


def test_another_thread_is_not_captured(backend: Backend, graph: BreakableGraph) -> None:
    x, results = torch.ones(4, device=backend.device), []
    with graph.record():
        thread = threading.Thread(target=lambda: results.append(multiply_on_host(torch.ones(4)).tolist()))
        thread.start()
        thread.join()
        multiply_on_host(x)
    assert results == [[40.0] * 4]
    assert graph.breaks == 1


def test_a_call_runs_in_the_modes_of_its_capture(backend: Backend, graph: BreakableGraph) -> None:
    x, modes = torch.ones(4, device=backend.device), []

    @eager_break
    def note(y: Tensor) -> Tensor:
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return y + 1.0

    with torch.inference_mode():
        result = graph.capture(lambda: note(x) * 2.0)
    x.fill_(3.0)
    graph.replay()
    assert modes == [(True, False)] * 2
    assert result.tolist() == [8.0] * 4
    assert not torch.is_inference_mode_enabled()
    other = BreakableGraph(backend, backend.new_pool())
    with torch.no_grad():
        other.capture(note, x)
    other.replay()
    assert modes[2:] == [(False, False)] * 2
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("make", KERNEL_BACKENDS)
def test_kernels_on_both_sides_of_a_break(make: Callable[[], Backend]) -> None:
    """A kernel over the step's lengths runs eagerly, between segments of a kernel and of torch's operators."""
    backend = make()
    engine = Engine(backend, faulty=False)
    attend = eager_break(engine.sums)

    def step() -> Tensor:
        return engine.sums() + attend() * 2.0

    engine.refill(STEPS[0])
    backend.warm_up(step)
    graph = BreakableGraph(backend, engine.pool)
    result = graph.capture(step)
    for lengths in STEPS:
        engine.refill(lengths)
        churn(backend)
        graph.replay()
        replayed = result.clone()
        assert replayed.equal(engine.sums() * 3.0)
    assert (graph.segments, graph.breaks, graph.replays) == (2, 1, len(STEPS))


@pytest.mark.parametrize("make", KERNEL_BACKENDS)
def test_an_operator_without_its_break_is_refused(make: Callable[[], Backend]) -> None:
    backend = make()
    engine = Engine(backend, faulty=False)
    engine.refill(STEPS[0])
    backend.warm_up(engine.sums)
    graph = BreakableGraph(backend, engine.pool, must_break={"graph_faults::sum"})
    with pytest.raises(CaptureError, match="graph_faults::sum: captured without its break"):
        graph.capture(lambda: multiply_on_host(engine.sums()))
    assert not backend.is_capturing()
    result = graph.capture(lambda: eager_break(engine.sums)() + 1.0)
    engine.refill(STEPS[1])
    graph.replay()
    assert result.equal(engine.sums() + 1.0)


@pytest.mark.parametrize("name", ["graph_faults::summ", "graph_faults", "", "::sum"])
def test_an_operator_that_does_not_exist_is_refused(backend: Backend, name: str) -> None:
    with pytest.raises(ValueError, match="expected a registered operator"):
        BreakableGraph(backend, backend.new_pool(), must_break=[name])


def test_a_capture_that_never_broke_is_refused(backend: Backend, graph: BreakableGraph) -> None:
    x = torch.zeros(4, device=backend.device)
    with pytest.raises(CaptureError, match="never broke"):
        graph.capture(x.add_, 1.0)
    assert x.tolist() == [0.0] * 4
    assert not backend.is_capturing()
    with pytest.raises(ReplayError, match="never ended"):
        graph.replay()
    assert (graph.segments, graph.replays) == (0, 0)


def test_captures_are_not_mixed(backend: Backend, graph: BreakableGraph) -> None:
    x = torch.ones(4, device=backend.device)
    graph.capture(multiply_on_host, x)
    with pytest.raises(CaptureError, match="holds a capture already"):
        graph.capture(multiply_on_host, x)
    other = BreakableGraph(backend, backend.new_pool())
    with other.record():
        multiply_on_host(x)
        with pytest.raises(ReplayError, match="a graph is replayed inside of a capture"):
            graph.replay()
        with pytest.raises(CaptureError, match="inside of another"):
            BreakableGraph(backend, backend.new_pool()).capture(multiply_on_host, x)
        multiply_on_host(x)
    assert (other.breaks, graph.breaks) == (2, 1)


def test_what_does_nothing_when_it_is_called_cannot_break() -> None:
    def generate() -> object:
        yield 1

    with pytest.raises(TypeError, match="whose call does its work"):
        eager_break(generate)


def fork_around_a_break(backend: Backend, x: Tensor) -> Tensor:
    branch = backend.fork()
    with branch:
        side = x * 3.0
    total = multiply_on_host(x * 2.0) + side  # the break joins the branch
    branch.join()
    with branch:
        late = side + 1.0
    branch.join()
    return total + late


@pytest.mark.gpu
def test_branches_are_joined_before_a_segment_ends() -> None:
    backend = CudaBackend()
    x = torch.ones(4, device=backend.device)
    backend.warm_up(lambda: fork_around_a_break(backend, x))
    graph = BreakableGraph(backend, backend.new_pool())
    result = graph.capture(fork_around_a_break, backend, x)
    for value in (2.0, 3.0):
        x.fill_(value)
        graph.replay()
        assert result.tolist() == [10 * 8.0 * value + 6.0 * value + 1.0] * 4
    broken = BreakableGraph(backend, backend.new_pool())
    with pytest.raises(CaptureError, match="inside of a branch"), broken.record(), backend.fork():
        multiply_on_host(x)
    assert not backend.is_capturing()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    graph.replay()
    assert result.tolist() == [10 * 24.0 + 19.0] * 4


def test_the_emulation_declines_branches() -> None:
    backend = EmulatedBackend()
    with pytest.raises(NotEmulated):
        BreakableGraph(backend, backend.new_pool()).capture(fork_around_a_break, backend, torch.ones(4))
    assert not backend.is_capturing()


def test_the_emulation_declines_a_break_inside_of_a_function_mode() -> None:
    """Which would end with the segment, and leave the emulation's own behind."""
    backend = EmulatedBackend()
    with pytest.raises(NotEmulated), BreakableGraph(backend, backend.new_pool()).record(), torch.device("cpu"):
        multiply_on_host(torch.ones(4))
    assert not backend.is_capturing()
    assert torch.ones(4).tolist() == [1.0] * 4


def test_breaks_follow_each_other(backend: Backend, graph: BreakableGraph) -> None:
    """Segments with nothing in them cost no launch, and change nothing."""
    x = torch.ones(1, device=backend.device)

    def step() -> Tensor:
        y = x
        for _ in range(4):
            y = multiply_on_host(y, factor=2)
        return y

    result = graph.capture(step)
    x.fill_(3.0)
    graph.replay()
    assert result.tolist() == [3.0 * 2**4]
    assert (graph.segments, graph.breaks, graph.num_nodes) == (5, 4, 0)


def test_the_example_of_the_documentation_runs() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "graphs.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(block, {"__name__": "graphs"})
