"""A model's step in every execution mode; what a mode is, docs/modes.md says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ..execution.compiled import Compiled
from ..execution.graphs.breakable import BreakableGraph, eager_break
from ..execution.graphs.interface import Graph, capture
from ..execution.modes import Counted, Machine, WrongMode
from ..execution.program import Tensors
from .step import Flow, ModelStep


class Runner(Protocol):
    """A model's step in one mode, prepared over what its buffers hold now."""

    outputs: Tensors  # of every layer's attention
    results: Tensors  # the last hidden states: valid until a graph runs that was captured before them in the same pool

    def run(self) -> None:
        """Run it on what its buffers hold now. Does not wait for the device."""

    def counts(self) -> dict[str, int]:
        """What really happened: "replays" of graphs."""

    def release(self) -> None:
        """Give up what was captured."""


class Eager:
    """Every operator of the step, issued anew."""

    def __init__(self, step: ModelStep, machine: Machine) -> None:
        self._step = step
        self.outputs, self.results = step()

    def run(self) -> None:
        self.outputs, self.results = self._step()

    def counts(self) -> dict[str, int]:
        return {}

    def release(self) -> None:
        """Nothing was captured."""


class Full:
    """The whole step in one graph."""

    def __init__(self, step: ModelStep, machine: Machine) -> None:
        self._step = step  # a graph keeps addresses: whoever replays it has to keep the buffers
        step.call = self._call = Counted(step.call)
        machine.backend.warm_up(step)
        with capture(machine.backend, machine.pool) as self._graph:
            self.outputs, self.results = step()
        self._captured = self._call.made

    def run(self) -> None:
        self._graph.replay()
        if self._call.made != self._captured:
            raise WrongMode("full: the candidate was called at a replay")

    def counts(self) -> dict[str, int]:
        return {"graphs": 1, "nodes": self._graph.num_nodes, "replays": self._graph.replays}

    def release(self) -> None:
        self._graph.release()


class Piecewise:
    """A graph for each piece, and attention called between two of them."""

    def __init__(self, step: ModelStep, machine: Machine) -> None:
        step.call = self._call = Counted(step.call)
        machine.backend.warm_up(step)
        self._step = step
        self._graphs: list[Graph] = []
        self._arguments: list[dict[str, Any]] = []
        flow: Flow | None = None
        for number in range(step.num_pieces):
            with capture(machine.backend, machine.pool) as graph:
                flow = step.piece(number, flow)
            self._graphs.append(graph)
            if number < step.shape.num_layers:
                self._arguments.append(step.arguments(number, flow))
        assert flow is not None
        self.outputs, self.results = step.outputs, {"hidden": flow.hidden}

    def run(self) -> None:
        before = self._call.made
        for index, arguments in enumerate(self._arguments):
            self._graphs[index].replay()
            self._step.attend(index, arguments)
        self._graphs[-1].replay()
        _require_calls("piecewise", self._call.made - before, len(self._arguments))

    def counts(self) -> dict[str, int]:
        replays = sum(graph.replays for graph in self._graphs)
        nodes = sum(graph.num_nodes for graph in self._graphs)
        return {"graphs": len(self._graphs), "nodes": nodes, "replays": replays}

    def release(self) -> None:
        for graph in self._graphs:
            graph.release()


class Breakable:
    """The step captured as one, broken at each layer's attention."""

    def __init__(self, step: ModelStep, machine: Machine) -> None:
        self._step = step
        step.call = self._call = Counted(step.call)
        machine.backend.warm_up(step)
        self._graph = BreakableGraph(machine.backend, machine.pool)
        self.outputs, self.results = self._graph.capture(step.run, eager_break(name="attention")(step.attend))
        self._breaks = step.shape.num_layers
        if self._graph.breaks != self._breaks:
            raise WrongMode(f"breakable: found {self._graph.breaks} breaks, expected one for each of {self._breaks}")

    def run(self) -> None:
        before = self._call.made
        self._graph.replay()
        _require_calls("breakable", self._call.made - before, self._breaks)

    def counts(self) -> dict[str, int]:
        graph = self._graph
        return {"graphs": graph.segments, "nodes": graph.num_nodes, "replays": graph.replays * graph.segments}

    def release(self) -> None:
        self._graph.release()


class CompiledStep:
    """The step as the compiler has it, split at registered operators."""

    def __init__(self, step: ModelStep, machine: Machine) -> None:
        self._compiled = Compiled([step], machine)
        (self.outputs,), (self.results,) = self._compiled.outputs, self._compiled.results

    def run(self) -> None:
        self._compiled.run()
        (self.outputs,), (self.results,) = self._compiled.outputs, self._compiled.results

    def counts(self) -> dict[str, int]:
        return self._compiled.counts()

    def release(self) -> None:
        self._compiled.release()


def _require_calls(mode: str, found: int, expected: int) -> None:
    if found != expected:
        raise WrongMode(f"{mode}: found {found} calls between the graphs, expected {expected}")


# By name; eager is what the others are compared with.
RUNNERS: dict[str, Callable[[ModelStep, Machine], Runner]] = {
    "eager": Eager,
    "full": Full,
    "piecewise": Piecewise,
    "breakable": Breakable,
    "compiled": CompiledStep,
}
