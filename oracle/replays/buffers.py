"""The tensors of one step, and persistent ones that hold one step after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..building.guards import SMALL_INPUTS, Guards
from ..building.problem import Problem
from ..building.tensors import build
from ..case import ATTENTION_OPERATIONS
from ..checks.memory import bits_of
from ..execution.program import Call, Program
from .sequence import Step
from .writing import Writing, writing_of

CACHES = ("k_cache", "v_cache", "latent_cache")


@dataclass
class InMemory:
    """A step in memory: as built, it is what everything but the outputs has to be afterwards as well."""

    problem: Problem
    writing: Writing | None  # the KV update in the same step

    @property
    def caches(self) -> dict[str, Tensor]:
        return {name: self.problem.arguments[name] for name in CACHES if name in self.problem.arguments}

    def unwrite(self, caches: Mapping[str, Tensor] | None = None) -> None:
        """Take out of the caches, its own or others that hold the step, what the step's own update has to bring."""
        if self.writing is not None:
            self.writing.put(self.caches if caches is None else caches, self.writing.stale)

    def program(self, call: Call) -> Program:
        problem, writing = self.problem, self.writing
        # A dict of its own: what a candidate does to it must not reach what the answer is made from.
        plain = Program(call, problem.case.spec.operation, dict(problem.arguments), problem.outputs)
        if writing is None:
            return plain
        given = {**writing.rows, **self.caches, "slot_mapping": writing.slot_mapping, "scales": writing.scales}
        return replace(plain, update=writing.operation, update_arguments=given)


@torch.no_grad()
def tensors_of(step: Step, device: torch.device, *, updates: bool) -> InMemory:
    """The tensors of a step; `updates`: attention comes after a KV update of the candidate's."""
    problem = build(step.case, device)
    if "slot_mapping" in problem.arguments:
        problem = _padded_slots(problem)
    if step.case.spec.operation not in ATTENTION_OPERATIONS or not (updates or step.rewrites):
        return InMemory(problem, None)
    made = InMemory(problem, None)
    writing = writing_of(problem, made.caches, rewrites=step.rewrites)
    if step.rewrites:  # the rejected tokens' values are those of the case itself
        writing = replace(writing, **_exchanged(writing))
        writing.put(made.caches, writing.finished)
        problem = replace(problem, guards=Guards.over(problem.guards.watches))
    return InMemory(problem, writing if updates else None)


class Buffers(InMemory):
    """Persistent tensors of one bucket, refilled between replays; their addresses never change."""

    def refill(self, step: InMemory) -> None:
        """Everything as `step` has it: on a GPU in one launch, but for tensors whose rows lie apart."""
        mine, theirs = _memories(self.problem), _memories(step.problem)
        for tensor, wanted in zip(_small_tensors(self), _small_tensors(step), strict=True):
            if tensor.is_contiguous() and wanted.is_contiguous():
                mine.append(tensor.view(-1).view(torch.uint8))
                theirs.append(wanted.view(-1).view(torch.uint8))
            else:
                tensor.copy_(wanted.reshape(tensor.shape))
        torch._foreach_copy_(mine, theirs)

    def guarded(self) -> Guards:
        """What the memory is to be after a step, outputs aside: as it was refilled."""
        return Guards.over(self.problem.guards.watches)


def _exchanged(writing: Writing) -> dict[str, Any]:
    """The update that brings what is stale, over what is finished."""
    rows = {name: -tensor for name, tensor in writing.rows.items()}
    return {"finished": writing.stale, "stale": writing.finished, "rows": rows}


def _padded_slots(problem: Problem) -> Problem:
    """With a slot for every row of the bucket, -1 past the step's own."""
    given = problem.arguments["slot_mapping"]
    whole = torch.full((problem.case.batch.num_tokens,), -1, dtype=torch.int64, device=given.device)
    whole[: len(given)] = given
    return replace(problem, arguments={**problem.arguments, "slot_mapping": whole})


def _memories(problem: Problem) -> list[Tensor]:
    """uint8: all watched memories whose size does not depend on the batch, but on the bucket."""
    return [watch.memory.view(torch.uint8) for watch in problem.guards.watches if watch.name != SMALL_INPUTS]


def _small_tensors(memory: InMemory) -> list[Tensor]:
    """The arguments that are in none of those memories, as integers; and what the step writes, and where."""
    problem, writing = memory.problem, memory.writing
    elsewhere = {watch.memory.data_ptr() for watch in problem.guards.watches if watch.name != SMALL_INPUTS}
    tensors = [bits_of(leaf) for _, leaf in _leaves(problem.arguments) if _start(leaf) not in elsewhere]
    return tensors if writing is None else [*tensors, *writing.rows.values(), writing.slot_mapping]


def _start(tensor: Tensor) -> int:
    """Of the memory that it lies in."""
    return tensor.untyped_storage().data_ptr()


def _leaves(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the arguments, by the names that lead to it."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif is_dataclass(value):
            parts = {item.name: getattr(value, item.name) for item in fields(value)}
            yield from _leaves(parts, f"{prefix}{name}.")
