"""The execution modes: how a step is prepared once and then run again and again over the same memory.

| mode | what is captured or compiled | what runs as Python at each step |
|---|---|---|
| full | the whole step, in one graph | nothing |
| piecewise | what is before and after the operation, in two graphs | the operation, and by turns the KV update |
| breakable | one capture of the whole step, broken at the operation | the same |
| compiled | the whole step, split at registered operators | what the compiler made of it |

In mode full_and_piecewise a step is prepared both ways, and `dispatch` says which of them takes a batch.
Each runner checks that what ran is the mode that was asked for, and counts what really happened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .compiled import Compiled
from .eager import unzeroed_allocations
from .graphs.breakable import BreakableGraph, eager_break
from .graphs.interface import Backend, capture
from .program import Call, Program, Tensors


class WrongMode(Exception):
    """Something else ran than the mode that was asked for."""


class Runner(Protocol):
    """A step in one mode, prepared over what its memory holds now."""

    outputs: Tensors  # of the operation
    results: Tensors  # of the tail: valid until a graph runs that was captured before them into the same memory

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

    def __init__(self, program: Program, machine: Machine) -> None:
        self._call = Counted(program.call)
        program = replace(program, call=self._call)
        _warm_up(program, machine)
        with capture(machine.backend, machine.pool) as self._graph:
            self.outputs, self.results = program()
        self._captured = self._call.made
        if not self._graph.num_nodes:
            raise WrongMode("full: found a graph without a node, expected one that does the step")

    def run(self) -> None:
        self._graph.replay()
        if self._call.made != self._captured:
            raise WrongMode("full: the candidate was called at a replay")

    def counts(self) -> dict[str, int]:
        return {"replays": self._graph.replays}

    def release(self) -> None:
        self._graph.release()


class Piecewise:
    """Graphs around the operation, which is called anew at every step.

    What it returns in memory of its own is copied to where the captured tail reads.
    """

    def __init__(self, program: Program, machine: Machine) -> None:
        self._call = Counted(program.call)
        self._program = program = replace(program, call=self._call)
        self._splits_update = machine.splits_update and bool(program.update)
        _warm_up(program, machine)
        with capture(machine.backend, machine.pool) as self._head:
            self._rows = program.head()
            if not self._splits_update:
                program.write(self._rows)
        self._head.replay()  # a capture computes nothing, and the operation that comes next is for real
        self.outputs = self._between()
        with capture(machine.backend, machine.pool) as self._tail:
            self.results = program.tail(self.outputs)
        self._each = 1 + self._splits_update
        if not (self._head.num_nodes and self._tail.num_nodes):
            raise WrongMode("piecewise: found a graph without a node, expected one on each side of the operation")

    def run(self) -> None:
        before = self._call.made
        self._head.replay()
        for name, tensor in self._between().items():
            if tensor is not self.outputs[name]:
                self.outputs[name].copy_(tensor)
        self._tail.replay()
        if self._call.made != before + self._each:
            found = self._call.made - before
            raise WrongMode(f"piecewise: found {found} calls between the graphs, expected {self._each}")

    def counts(self) -> dict[str, int]:
        return {"replays": self._head.replays - 1 + self._tail.replays}

    def release(self) -> None:
        self._head.release()
        self._tail.release()

    def _between(self) -> Tensors:
        if self._splits_update:
            self._program.write(self._rows)
        return self._program.attend(self._rows)


class Breakable:
    """The step captured as one, with the operation (by turns the KV update too) broken out of it."""

    def __init__(self, program: Program, machine: Machine) -> None:
        self._call = Counted(program.call)
        program = replace(program, call=self._call)
        attend = eager_break(name=program.operation)(program.attend)
        write = eager_break(name=program.update)(program.write)
        splits_update = machine.splits_update and bool(program.update)
        self._each = 1 + splits_update

        def step() -> tuple[Tensors, Tensors]:
            rows = program.head()
            (write if splits_update else program.write)(rows)
            outputs = attend(rows)
            return outputs, program.tail(outputs)

        _warm_up(program, machine)
        self._graph = BreakableGraph(machine.backend, machine.pool)
        self.outputs, self.results = self._graph.capture(step)
        if self._graph.breaks != self._each:
            raise WrongMode(f"breakable: found {self._graph.breaks} breaks, expected {self._each}")

    def run(self) -> None:
        before = self._call.made
        self._graph.replay()
        if self._call.made != before + self._each:
            found = self._call.made - before
            raise WrongMode(f"breakable: found {found} calls between the segments, expected {self._each}")

    def counts(self) -> dict[str, int]:
        return {"replays": self._graph.replays}

    def release(self) -> None:
        self._graph.release()


def _warm_up(program: Program, machine: Machine) -> None:
    def once() -> None:
        with unzeroed_allocations():
            program()

    machine.backend.warm_up(once)


# What runs a case in a mode, by the names of `case.MODES`; full_and_piecewise is made of two of them.
RUNNERS: dict[str, Callable[[Program, Machine], Runner]] = {
    "full": Full,
    "compiled": Compiled,
    "piecewise": Piecewise,
    "breakable": Breakable,
}
