"""The execution modes: how a step is prepared once and then run again and again over the same memory.

| mode | what is captured or compiled | what runs as Python at each step |
|---|---|---|
| full | the whole step, in one graph | nothing |
| piecewise | what lies around the operations, in graphs | the operations, and by turns the KV updates |
| breakable | one capture of the whole step, broken at the operations | the same |
| compiled | the whole step, split at registered operators | what the compiler made of it |

In mode full_and_piecewise a step is prepared both ways, and `dispatch` says which of them takes a batch.
Each runner checks that what ran is the mode that was asked for, and counts what really happened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .compiled import Compiled
from .eager import unzeroed_allocations
from .graphs.breakable import BreakableGraph, eager_break
from .graphs.interface import Backend, Graph, capture
from .program import Call, Program, Tensors, run_layers


class WrongMode(Exception):
    """Something else ran than the mode that was asked for."""


class Runner(Protocol):
    """A step in one mode, prepared over what its memory holds now."""

    outputs: list[Tensors]  # of each layer's operation
    results: list[Tensors]  # of each tail: valid until a graph runs that was captured before them into the same memory

    def run(self) -> None:
        """Run it on what its memory holds now. Does not wait for the device."""

    def counts(self) -> dict[str, int]:
        """What really happened: "replays" of graphs."""

    def release(self) -> None:
        """Give up what was captured."""


@dataclass(frozen=True)
class Machine:
    """Where modes run: a way to capture, and the memory that all captures share."""

    backend: Backend
    pool: Any
    splits_update: bool = False  # piecewise: the KV update too runs between the graphs


class Counted:
    """A candidate's call that knows how often it was made."""

    def __init__(self, call: Call) -> None:
        self._call, self.made = call, 0

    def __call__(self, operation: str, arguments: dict[str, Any]) -> Any:
        self.made += 1
        return self._call(operation, arguments)


class Full:
    """The whole step in one graph."""

    def __init__(self, layers: Sequence[Program], machine: Machine) -> None:
        layers, self._calls = _counted(layers)
        _warm_up(layers, machine)
        with capture(machine.backend, machine.pool) as self._graph:
            self.outputs, self.results = run_layers(layers)
        self._captured = self._calls.made
        if not self._graph.num_nodes:
            raise WrongMode("full: found a graph without a node, expected one that does the step")

    def run(self) -> None:
        self._graph.replay()
        if self._calls.made != self._captured:
            raise WrongMode("full: the candidate was called at a replay")

    def counts(self) -> dict[str, int]:
        return {"replays": self._graph.replays}

    def release(self) -> None:
        self._graph.release()


class Piecewise:
    """Graphs around the operations, which are called anew at every step.

    What one returns in memory of its own is copied to where the captured tail reads.
    """

    def __init__(self, layers: Sequence[Program], machine: Machine) -> None:
        self._layers, self._calls = _counted(layers)
        self._splits_update = machine.splits_update and bool(layers[0].update)
        self._each = len(layers) * (1 + self._splits_update)
        _warm_up(self._layers, machine)
        self.outputs: list[Tensors] = []
        self.results: list[Tensors] = []
        self._rows: list[Tensors] = []
        self._graphs: list[Graph] = []
        for index in range(len(layers)):
            self._graphs.append(self._captured(machine, index))
            self._graphs[index].replay()  # a capture computes nothing, and the operation that comes next is for real
            self.outputs.append(self._between(index))
        self._graphs.append(self._captured(machine, len(layers)))
        if not all(graph.num_nodes for graph in self._graphs):
            raise WrongMode("piecewise: found a graph without a node, expected one on each side of every operation")

    def run(self) -> None:
        before = self._calls.made
        for index, outputs in enumerate(self.outputs):
            self._graphs[index].replay()
            for name, tensor in self._between(index).items():
                if tensor is not outputs[name]:
                    outputs[name].copy_(tensor)
        self._graphs[-1].replay()
        if self._calls.made != before + self._each:
            found = self._calls.made - before
            raise WrongMode(f"piecewise: found {found} calls between the graphs, expected {self._each}")

    def counts(self) -> dict[str, int]:
        return {"replays": sum(graph.replays for graph in self._graphs) - len(self._layers)}

    def release(self) -> None:
        for graph in self._graphs:
            graph.release()

    def _captured(self, machine: Machine, index: int) -> Graph:
        """What lies before the operation of layer `index`, or after the last one."""
        with capture(machine.backend, machine.pool) as graph:
            if index:
                self.results.append(self._layers[index - 1].tail(self.outputs[index - 1]))
            if index < len(self._layers):
                self._rows.append(self._layers[index].head())
                if not self._splits_update:
                    self._layers[index].write(self._rows[index])
        return graph

    def _between(self, index: int) -> Tensors:
        if self._splits_update:
            self._layers[index].write(self._rows[index])
        return self._layers[index].attend(self._rows[index])


class Breakable:
    """The step captured as one, with the operations (by turns the KV updates too) broken out of it."""

    def __init__(self, layers: Sequence[Program], machine: Machine) -> None:
        layers, self._calls = _counted(layers)
        splits_update = machine.splits_update and bool(layers[0].update)
        self._each = len(layers) * (1 + splits_update)
        _warm_up(layers, machine)
        self._graph = BreakableGraph(machine.backend, machine.pool)
        self.outputs: list[Tensors] = []
        self.results: list[Tensors] = []
        with self._graph.record():
            for layer in layers:
                self._record(layer, splits_update)
        if self._graph.breaks != self._each:
            raise WrongMode(f"breakable: found {self._graph.breaks} breaks, expected {self._each}")

    def run(self) -> None:
        before = self._calls.made
        self._graph.replay()
        if self._calls.made != before + self._each:
            found = self._calls.made - before
            raise WrongMode(f"breakable: found {found} calls between the segments, expected {self._each}")

    def counts(self) -> dict[str, int]:
        return {"replays": self._graph.replays}

    def release(self) -> None:
        self._graph.release()

    def _record(self, layer: Program, splits_update: bool) -> None:
        write = eager_break(name=layer.update)(layer.write) if splits_update else layer.write
        rows = layer.head()
        write(rows)
        outputs = eager_break(name=layer.operation)(layer.attend)(rows)
        self.outputs.append(outputs)
        self.results.append(layer.tail(outputs))


def _counted(layers: Sequence[Program]) -> tuple[list[Program], Counted]:
    """The same layers with calls that are counted together."""
    calls = Counted(layers[0].call)
    return [replace(layer, call=calls) for layer in layers], calls


def _warm_up(layers: Sequence[Program], machine: Machine) -> None:
    def once() -> None:
        with unzeroed_allocations():
            run_layers(layers)

    machine.backend.warm_up(once)


# What runs a case in a mode, by the names of `case.MODES`; full_and_piecewise is made of two of them.
RUNNERS: dict[str, Callable[[Sequence[Program], Machine], Runner]] = {
    "full": Full,
    "compiled": Compiled,
    "piecewise": Piecewise,
    "breakable": Breakable,
}
