"""One case that agreed with the reference, as the checks see it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ..bound.evaluate import Expected, evaluate
from ..building.problem import Problem
from ..candidate import Candidate, NumericContract
from ..case import Case
from ..execution.eager import run
from .layout import Layout, layout_of
from .memory import unwritten_like


class CandidateError(Exception):
    """The candidate raised while a check ran it again; the cause is what it raised."""


@dataclass(frozen=True)
class Session:
    """What was run and what came of it. A check may run the candidate again, and leaves these tensors as they are."""

    candidate: Candidate
    contract: NumericContract
    problem: Problem
    actual: dict[str, Tensor]  # the outputs by name, as the candidate left them
    expected: Expected

    @property
    def case(self) -> Case:
        return self.problem.case

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the run; not to be changed."""
        return self.problem.arguments

    @cached_property
    def layout(self) -> Layout:
        """Where the case's keys lie and who may see them, worked out on the host."""
        return layout_of(self.case)

    @property
    def queries(self) -> dict[str, Tensor]:
        """The arguments with a row for each token and a head for each query head: q, or q_nope and q_pe."""
        return {name: self.arguments[name] for name in ("q", "q_nope", "q_pe") if name in self.arguments}

    @property
    def caches(self) -> dict[str, Tensor]:
        names = ("k_cache", "v_cache", "latent_cache")
        return {name: self.arguments[name] for name in names if name in self.arguments}

    def changed(self, **changes: Any) -> Problem:
        """The same call with some arguments exchanged, and outputs of its own that were never written.

        The outputs have a row for each token of the queries, and the strides and the alignment they had.
        """
        arguments = {**self.arguments, **changes}
        rows = next((arguments[name].shape[0] for name in self.queries), None)
        outputs = {name: unwritten_like(tensor, rows, self.case) for name, tensor in self.problem.outputs.items()}
        return replace(self.problem, arguments={**arguments, **outputs}, outputs=outputs)

    def run(self, problem: Problem | None = None) -> dict[str, Tensor]:
        """The candidate's outputs for a changed problem; without one, for the same arguments again."""
        try:
            return run(self.candidate, self.changed() if problem is None else problem)
        except Exception as error:
            raise CandidateError from error

    def expect(self, problem: Problem) -> Expected:
        """What a changed problem's outputs should be; to be asked for after the candidate has run it."""
        return evaluate(problem, self.contract, with_statistics=False)
