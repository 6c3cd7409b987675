"""A step as an engine issues it, in pieces that a mode may capture, compile or leave between two captures.

A step is one layer after the other, and a layer is a program of four pieces:

| piece | in an engine | here |
|---|---|---|
| head | the projections | copies of the rows, in memory of their own |
| write | the KV update | the candidate's update of the same caches that are read next; an attention step's alone |
| attend | the operation | the candidate's call |
| tail | what consumes its outputs | copies of the outputs, in memory of their own |

The tail of a layer and the head of the next lie between two operations, where an engine has its other layers.
Everything the pieces read and write stays where it is; only what it holds changes between two runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Call = Callable[[str, dict[str, Any]], Any]
Tensors = dict[str, Tensor]

ROWS = ("q", "q_nope", "q_pe", "key", "value", "latent", "k_pe", "out_a", "lse_a", "out_b", "lse_b")


@dataclass(frozen=True)
class Program:
    """One layer of a candidate's step over fixed tensors. Only tensors go from piece to piece."""

    call: Call
    operation: str
    arguments: dict[str, Any]  # of the operation, rows and outputs included
    outputs: Tensors  # what the operation writes; empty for merge_states, which returns its own
    update: str = ""  # the operation that writes before it; "": none
    update_arguments: Mapping[str, Any] | None = None

    def head(self) -> Tensors:
        """Copies of every row that an operation of the step reads, with the strides that they have."""
        given = {**(self.update_arguments or {}), **self.arguments}
        return {name: _copied(given[name]) for name in ROWS if name in given}

    def write(self, rows: Tensors) -> None:
        if self.update_arguments is not None:
            self._issue(self.update, self.update_arguments, rows)

    def attend(self, rows: Tensors) -> Tensors:
        """The outputs by name."""
        returned = self._issue(self.operation, self.arguments, rows)
        return self.outputs or {"out": returned[0], "lse": returned[1]}

    def tail(self, outputs: Tensors) -> Tensors:
        return {name: tensor.clone() for name, tensor in outputs.items()}

    def __call__(self) -> tuple[Tensors, Tensors]:
        """All of it: the outputs, and what the tail made of them."""
        rows = self.head()
        self.write(rows)
        outputs = self.attend(rows)
        return outputs, self.tail(outputs)

    def _issue(self, operation: str, arguments: Mapping[str, Any], rows: Tensors) -> Any:
        return self.call(operation, {name: rows.get(name, value) for name, value in arguments.items()})


class Step(Protocol):
    """What its operations wrote, and what it made of that: a `Program`, or a step with operations of its own."""

    def __call__(self) -> tuple[Tensors, Tensors]: ...


def run_layers(layers: Sequence[Step]) -> tuple[list[Tensors], list[Tensors]]:
    """All layers in order: the outputs of each, and what its tail made of them."""
    ran = [layer() for layer in layers]
    return [outputs for outputs, _ in ran], [results for _, results in ran]


def _copied(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
