"""What crosses a break stays where it was: held, verified and copied into, whatever else is captured and replayed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof.oracle.execution.graphs import breakable
from pageproof.oracle.execution.graphs.breakable import BreakableGraph, eager_break
from pageproof.oracle.execution.graphs.calls import EagerCall
from pageproof.oracle.execution.graphs.errors import CaptureError, DanglingPointer, ReplayError
from pageproof.oracle.execution.graphs.interface import Backend

from .graph_backends import BACKENDS
from .graph_engine import churn


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    made: Backend = request.param()
    return made


class Bucket:
    """Rows of a step, of which some are live: the eager call writes those of its output buffer, and no others."""

    def __init__(self, backend: Backend, pool: Any, num_rows: int) -> None:
        self.x = torch.full((num_rows,), float(num_rows), device=backend.device)
        self.live = num_rows
        self.graph = BreakableGraph(backend, pool)
        self.result = self.graph.capture(self.step)

    @eager_break
    def attend(self, scores: Tensor, out: Tensor) -> None:
        out[: self.live] = scores[: self.live] + 1.0

    def step(self) -> Tensor:
        out = torch.empty_like(self.x)
        self.attend(self.x * 2.0, out)
        return out * 3.0

    def run(self, value: float, live: int) -> list[float]:
        self.live = live
        self.x.fill_(value)
        self.graph.replay()
        rows: list[float] = self.result.tolist()
        return rows


def run_buckets(backend: Backend, make_pool: Callable[[], Any]) -> list[list[float]]:
    """Captured large to small, replayed in any order, with rows of earlier steps left in the padding."""
    buckets = {num_rows: Bucket(backend, make_pool(), num_rows) for num_rows in (300, 8, 4)}
    steps = [(300, 300), (4, 4), (8, 2), (300, 1), (8, 8), (4, 1), (8, 1), (300, 3), (4, 2), (8, 3)]
    results = []
    for value, (num_rows, live) in enumerate(steps):
        churn(backend)
        results.append(buckets[num_rows].run(float(value), live))
    return results


def weak(leaf: Any) -> Any:
    """The tensor by its address: whoever else gets that memory writes to it."""
    if not isinstance(leaf, Tensor):
        return leaf
    build: Any = torch._C._construct_storage_from_data_pointer  # type: ignore[attr-defined]
    storage = build(leaf.untyped_storage().data_ptr(), leaf.device, leaf.untyped_storage().nbytes())
    empty = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
    return empty.set_(storage, leaf.storage_offset(), leaf.size(), leaf.stride())


class WeakArguments(EagerCall):
    """Arguments are kept by address, as if their pool kept every block of theirs (SGLang #37606)."""

    def first(self) -> Any:
        result = super().first()
        self._args = tuple(map(weak, self._args))
        self._arguments = []
        return result


class NotCopied(EagerCall):
    """What a replay returns is not copied to where the next segment reads."""

    def _copy(self, found: list[tuple[str, Any]]) -> None:
        pass


class WeakOutputs(NotCopied):
    """Nor is it held."""

    def first(self) -> Any:
        result = super().first()
        self._result, self._outputs = [], []
        return result


def test_buckets_of_one_pool_are_replayed_in_any_order(backend: Backend) -> None:
    """What a bucket's steps put into its memory is there until its own next step, as with pools of their own."""
    pool = backend.new_pool()
    assert run_buckets(backend, lambda: pool) == run_buckets(backend, backend.new_pool)


def test_weak_arguments_are_carved_again_by_a_smaller_bucket(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, pool = run_buckets(backend, backend.new_pool), backend.new_pool()
    monkeypatch.setattr(breakable, "EagerCall", WeakArguments)
    assert run_buckets(backend, lambda: pool) != expected


def replay_doubled(backend: Backend) -> list[float]:
    """A step whose break returns something new each time."""
    x = torch.ones(4, device=backend.device)
    graph = BreakableGraph(backend, backend.new_pool())
    double = eager_break(lambda y: y * 2.0)
    result = graph.capture(lambda: double(x + 1.0) + 1.0)
    gc.collect()
    others = [torch.zeros(4, device=backend.device) for _ in range(64)]  # who hold memory that was given back
    x.fill_(5.0)
    graph.replay()
    rows: list[float] = result.tolist()
    assert not any(map(torch.any, others))
    return rows


def test_outputs_are_copied_to_where_the_next_segment_reads(backend: Backend) -> None:
    assert replay_doubled(backend) == [13.0] * 4


@pytest.mark.parametrize("planted", [NotCopied, WeakOutputs])
def test_outputs_that_are_not_copied_or_not_held_show(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, planted: type[EagerCall]
) -> None:
    monkeypatch.setattr(breakable, "EagerCall", planted)
    if planted is WeakOutputs and backend.name == "emulation":
        with pytest.raises(DanglingPointer, match=r"aten::add"):
            replay_doubled(backend)
    else:
        assert replay_doubled(backend) != [13.0] * 4


def test_an_output_written_in_place_is_not_copied(backend: Backend) -> None:
    out = torch.zeros(4, device=backend.device)
    graph = BreakableGraph(backend, backend.new_pool())
    result = graph.capture(lambda: eager_break(out.add_)(1.0)[1:] * 10.0)
    written = out._version
    graph.replay()
    assert (out._version - written, result.tolist()) == (1, [20.0] * 3)


@dataclass
class Answer:
    out: Tensor
    extra: dict[str, Any]


def test_outputs_in_containers(backend: Backend) -> None:
    x = torch.ones(4, device=backend.device)
    buffers = [torch.zeros(4, device=backend.device) for _ in range(2)]

    @eager_break
    def attend(y: Tensor) -> tuple[Answer, list[Tensor], Tensor]:
        """New memory, memory in turns (the other half of it swapped), and an argument."""
        for buffer, factor in zip(buffers, (2.0, 3.0), strict=True):
            torch.mul(y, factor, out=buffer)
        swapped = buffers[:: 1 if int(y[0]) == 1 else -1]
        return Answer(y + 1.0, {"name": "attend", "rows": 4, "parts": (y * 2.0, None)}), swapped, y.mul_(10.0)

    def step() -> list[Tensor]:
        answer, swapped, written = attend(x * 1.0)
        return [part * 1.0 for part in (answer.out, answer.extra["parts"][0], *swapped, written)]

    graph = BreakableGraph(backend, backend.new_pool())
    results = graph.capture(step)
    assert [int(result[0]) for result in results] == [2, 2, 2, 3, 10]
    x.fill_(5.0)
    graph.replay()
    assert [int(result[0]) for result in results] == [6, 10, 15, 10, 50]


CHANGED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "shape": (lambda y: (y, y[:2].clone()), r"output 1: found \(2,\).*expected a tensor of \(4,\)"),
    "dtype": (lambda y: (y, y.half()), r"output 1: found .*float16.*expected .*float32"),
    "class": (lambda y: (y, 3), "output 1: found int, expected a tensor"),
    "structure": (lambda y: y, "found the outputs .*expected"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_other_outputs_than_at_capture_are_refused(backend: Backend, change: str) -> None:
    x, changes = torch.ones(4, device=backend.device), [False]
    made, message = CHANGED[change]
    call = eager_break(lambda y: made(y + 1.0) if changes[0] else (y + 1.0, y + 2.0))
    graph = BreakableGraph(backend, backend.new_pool())
    result = graph.capture(lambda: torch.add(*call(x * 2.0)))
    changes[0] = True
    x.fill_(2.0)
    with pytest.raises(ReplayError, match=rf"break 1, .*<lambda>, of 2 segments, 1 breaks: {message}"):
        graph.replay()
    assert (result.tolist(), graph.replays) == ([7.0] * 4, 0)
    changes[0] = False
    graph.replay()
    assert (result.tolist(), graph.replays) == ([11.0] * 4, 1)


@pytest.mark.parametrize("other", [5, 4.0, "wide", None, object()], ids=["number", "type", "text", "none", "object"])
def test_another_value_than_at_capture_is_refused(backend: Backend, other: object) -> None:
    """The code after the call has made its decisions by it."""
    values: list[object] = [4, 4, other]
    call = eager_break(lambda: values.pop(0))
    graph = BreakableGraph(backend, backend.new_pool())
    graph.capture(call)
    graph.replay()
    with pytest.raises(ReplayError, match=r"output: found .*, expected 4"):
        graph.replay()


def test_an_expanded_output_is_refused(backend: Backend) -> None:
    x = torch.ones(1, device=backend.device)
    graph = BreakableGraph(backend, backend.new_pool())
    with pytest.raises(CaptureError, match="output: found an expanded tensor"):
        graph.capture(eager_break(lambda y: y.expand(4)), x)
    assert not backend.is_capturing()


def test_memory_exchanged_under_an_argument_is_refused(backend: Backend) -> None:
    x, held = torch.ones(4, device=backend.device), Answer(torch.ones(4, device=backend.device), {})
    graph = BreakableGraph(backend, backend.new_pool())
    result = graph.capture(lambda: eager_break(lambda y, *, answer: y + answer.out)(x * 2.0, answer=held) * 1.0)
    memory = held.out.data
    held.out.data = torch.full_like(x, 7.0)
    with pytest.raises(ReplayError, match=r"argument answer\.out: found its memory exchanged"):
        graph.replay()
    held.out.data = memory
    graph.replay()
    assert result.tolist() == [3.0] * 4


def test_what_the_caller_drops_is_held_until_the_release(backend: Backend) -> None:
    x, scale = torch.ones(4, device=backend.device), torch.full((4,), 3.0, device=backend.device)
    alive = weakref.ref(scale)
    graph = BreakableGraph(backend, backend.new_pool())
    multiply = eager_break(torch.mul)
    result = graph.capture(lambda given: multiply(x + 1.0, given[0]) + 1.0, [scale])
    del scale
    churn(backend)
    graph.replay()
    assert (alive() is not None, result.tolist()) == (True, [7.0] * 4)
    graph.release()
    graph.release()
    gc.collect()
    assert alive() is None
    with pytest.raises(ReplayError, match="released"):
        graph.replay()
    again = graph.capture(lambda: multiply(x, 5.0) + 1.0)
    graph.replay()
    assert (again.tolist(), graph.breaks) == ([6.0] * 4, 1)


def test_graphs_of_one_pool_run_one_at_a_time(backend: Backend) -> None:
    """One that is replayed in another's break would write over what that one's segments have passed on."""
    x, pool = torch.ones(4, device=backend.device), backend.new_pool()
    inner, outer = BreakableGraph(backend, pool), BreakableGraph(backend, pool)
    inner.capture(eager_break(torch.clone), x)
    nests = [True]

    @eager_break
    def nest(y: Tensor) -> Tensor:
        if nests[0]:
            inner.replay()
        return y + 1.0

    with pytest.raises(ReplayError, match="another graph of the same pool"):
        outer.capture(lambda: nest(x * 2.0) * 1.0)
    nests[0] = False
    result = outer.capture(lambda: nest(x * 2.0) * 1.0)
    nests[0] = True
    with pytest.raises(ReplayError, match="another graph of the same pool"):
        outer.replay()
    nests[0] = False
    outer.replay()
    inner.replay()
    assert (result.tolist(), inner.replays, outer.replays) == ([3.0] * 4, 1, 1)
