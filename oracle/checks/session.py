"""One case that agreed with the reference, as the checks see it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..bound.evaluate import Expected
from ..building.poison import sentinel_bits
from ..building.problem import Problem
from ..candidate import Candidate, NumericContract
from ..execution.eager import run
from ..formats import INTEGERS


class CandidateError(Exception):
    """The candidate raised while a check ran it again; the cause is what it raised."""


@dataclass(frozen=True)
class Session:
    """What was run and what came of it. A check may run the candidate again, and leaves these tensors as they are."""

    candidate: Candidate
    contract: NumericContract
    problem: Problem
    actual: dict[str, Tensor]  # the outputs by name, in the memory the candidate wrote them to
    expected: Expected

    def run(self, **changes: Any) -> dict[str, Tensor]:
        """The outputs of another run with some arguments exchanged, in memory of their own that was never written."""
        arguments = {**self.problem.arguments, **changes}
        outputs = {name: unwritten_like(arguments[name]) for name in self.problem.outputs}
        problem = replace(self.problem, arguments={**arguments, **outputs}, outputs=outputs)
        try:
            return run(self.candidate, problem)
        except Exception as error:
            raise CandidateError from error


def unwritten_like(tensor: Tensor) -> Tensor:
    """A tensor of this shape, packed, in which every element has the bits that an output is born with."""
    integers = INTEGERS[tensor.element_size()]
    fresh = tensor.new_empty(tensor.shape)
    fresh.view(integers).fill_(sentinel_bits(tensor.dtype))
    return fresh
