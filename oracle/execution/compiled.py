"""A step through the compiler: traced whole, split at every registered operator, and run without graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module
from torch.utils._python_dispatch import TorchDispatchMode

from .graphs import collection
from .program import Step, Tensors, run_layers

if TYPE_CHECKING:
    from .modes import Machine

_TORCHS_OWN = ("aten", "prims", "prim")


class OperatorsMoved(Exception):
    """The compiled step runs other operators than the plain one, or in another order."""


class Compiled:
    """The step as `torch.compile` traces it (fullgraph), cut at registered operators as engines cut it."""

    def __init__(self, layers: Sequence[Step], machine: Machine) -> None:
        with Operators() as plain:
            run_layers(layers)
        self._names: list[str] | None = None

        def step() -> tuple[list[Tensors], list[Tensors]]:
            return run_layers(layers)

        self._step = torch.compile(step, fullgraph=True, dynamic=False, backend=self._compile)
        with collection.paused():  # what the compiler allocates would set it off many times
            self.outputs, self.results = self._step()
        if self._names is None:
            raise OperatorsMoved("compiled: nothing was compiled")
        if self._names != plain.names:
            raise OperatorsMoved(f"compiled: found the operators {self._names}, expected {plain.names}")

    def run(self) -> None:
        self.outputs, self.results = self._step()

    def counts(self) -> dict[str, int]:
        return {}

    def release(self) -> None:
        torch._dynamo.reset()  # or this case's would count towards the limit of recompilations of the next ones

    def _compile(self, module: GraphModule, _inputs: Any) -> Callable[..., Any]:
        split = split_at_operators(module)
        self._names = registered_operators(split)
        return split


class Operators(TorchDispatchMode):
    """The registered operators that run inside of it, by name and in order; what they do inside is not looked at."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in _TORCHS_OWN:
            self.names.append(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


def split_at_operators(module: GraphModule) -> GraphModule:
    """Every registered operator in a module of its own, and what lies between two of them in another, in order."""
    parts: dict[Node, int] = {}
    part = 0
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        alone = _is_registered(node.target)
        part += alone
        parts[node] = part
        part += alone
    # Without keep_original_order the parts are sorted by what they hand on, and operators hand on nothing.
    return split_module(module, module, parts.__getitem__, keep_original_order=True)


def registered_operators(split: GraphModule) -> list[str]:
    """Those of the parts in the order in which they run."""
    parts = [split.get_submodule(str(node.target)) for node in split.graph.nodes if node.op == "call_module"]
    nodes = [node for part in parts if isinstance(part, GraphModule) for node in part.graph.nodes]
    return [_packet(node.target)._qualified_op_name for node in nodes if _is_registered(node.target)]


def _packet(target: Any) -> Any:
    return getattr(target, "overloadpacket", target)


def _is_registered(target: Any) -> bool:
    packet = _packet(target)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return packet._qualified_op_name.partition("::")[0] not in _TORCHS_OWN
