"""One plain call, in memory that was never zero."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..building.problem import Problem
from ..candidate import Candidate


def run(candidate: Candidate, problem: Problem) -> dict[str, Tensor]:
    """Call the candidate once and wait until it is done: its outputs by name, in the memory it wrote them to.

    Scratch that the candidate takes from torch.empty holds NaN (integers their largest value). What the
    candidate raises comes through.
    """
    memory = {name: tensor.data_ptr() for name, tensor in problem.outputs.items()}
    with unzeroed_allocations():
        # A dict of its own: what a candidate does to it must not reach what the answer is made from.
        returned = candidate.call(problem.case.spec.operation, dict(problem.arguments))
    for name, tensor in problem.outputs.items():
        if tensor.data_ptr() != memory[name]:
            raise RuntimeError(f"{name}: found other memory put under the tensor, expected it to be written in place")
    for device in {tensor.device for tensor in _tensors(problem) if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    if problem.outputs:
        return dict(problem.outputs)
    if not (isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(part, Tensor) for part in returned)):
        raise TypeError(f"merge_states: found {type(returned).__name__} returned, expected the tensors (out, lse)")
    return dict(zip(("out", "lse"), returned, strict=True))


@contextmanager
def unzeroed_allocations() -> Iterator[None]:
    """torch.empty gives NaN: torch's own switch, which hangs on its deterministic mode, and both put back after."""
    switch: Any = torch.utils.deterministic  # a module of one property, which type checkers do not see
    filled = switch.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # The mode warns of operators that have no deterministic form; that is no concern here.
        warnings.filterwarnings("ignore", message=".*determinis", category=UserWarning)
        switch.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=only_warned)
            switch.fill_uninitialized_memory = filled


def _tensors(problem: Problem) -> list[Tensor]:
    return [value for value in problem.arguments.values() if isinstance(value, Tensor)]
