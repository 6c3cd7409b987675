"""What is wrong after one run of a step: outputs, caches, bytes that are nobody's to change, bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bound.evaluate import Expected
from ..building.guards import Guards
from ..building.problem import Problem
from ..compare import Ratios, compare
from ..diagnose import with_hints
from ..verdict import Mismatch, Outcome, gravest
from .buffers import InMemory

Outputs = Mapping[str, Tensor]
Form = Mapping[str, tuple[torch.dtype, torch.Size]]


@dataclass(frozen=True, kw_only=True)
class Complaint:
    outcome: Outcome
    reason: str = ""
    mismatches: tuple[Mismatch, ...] = ()


@dataclass(frozen=True)
class Kept:
    """Outputs by value; lists are by layer."""

    bytes: Tensor  # `bytes_of` them
    forms: list[Form]

    @staticmethod
    def of(outputs: Sequence[Outputs]) -> Kept:
        return Kept(bytes_of(*outputs), forms_of(outputs))

    def tensors(self) -> list[dict[str, Tensor]]:
        """The outputs again, in memory of their own."""
        made = []
        for parts, form in zip(self.parts(), self.forms, strict=True):
            pairs = zip(parts, form.items(), strict=True)
            made.append({name: part.clone().view(dtype).view(shape) for part, (name, (dtype, shape)) in pairs})
        return made

    def parts(self) -> list[Sequence[Tensor]]:
        """The bytes of each output."""
        sizes = [[dtype.itemsize * shape.numel() for dtype, shape in form.values()] for form in self.forms]
        layers = self.bytes.split([sum(each) for each in sizes])
        return [layer.split(each) for layer, each in zip(layers, sizes, strict=True)]


def forms_of(outputs: Sequence[Outputs]) -> list[Form]:
    """What dtypes and shapes they have."""
    return [{name: (tensor.dtype, tensor.shape) for name, tensor in layer.items()} for layer in outputs]


def complaint_of(
    ran: InMemory, wanted: InMemory, outputs: Outputs, guards: Guards, expected: Expected
) -> tuple[Complaint | None, Ratios]:
    """What is wrong in the memory that a step ran in, and its outputs' largest errors in units of their bounds.

    `wanted`: the step as built, its caches as they should be now.
    """
    if (violation := guards.violations()) is not None:
        if ran.writing is not None and ran is not wanted:  # the caches are watched too, and may be what has changed
            wrong = _different(ran.caches, wanted.caches, _as_update(wanted))
            if wrong:
                return Complaint(outcome=Outcome.DIFFERS, reason="the caches after the KV update", mismatches=wrong), ()
        return Complaint(outcome=Outcome.OUT_OF_BOUNDS, reason=violation), ()
    return wrong_values(wanted, outputs, expected)


def wrong_values(wanted: InMemory, outputs: Outputs, expected: Expected) -> tuple[Complaint | None, Ratios]:
    """The same of the outputs alone."""
    mismatches, ratios = compare(dict(outputs), expected, wanted.problem)
    if not mismatches:
        return None, ratios
    mismatches = with_hints(wanted.problem, dict(outputs), expected, mismatches)
    return Complaint(outcome=gravest(mismatches), mismatches=mismatches), ratios


def bytes_of(*outputs: Outputs) -> Tensor:
    """uint8: a copy of all elements, one tensor after the other."""
    return torch.cat([_packed(tensor).view(torch.uint8) for part in outputs for tensor in part.values()])


def other_bits(like: Outputs, found: Tensor, wanted: Tensor, problem: Problem, what: str) -> Complaint | None:
    """The bytes of two sets of outputs, of the names and forms of `like`, are the same; if not, `what` is wrong."""
    wrong = _different(_apart(found, like), _apart(wanted, like), problem)
    return Complaint(outcome=Outcome.DIFFERS, reason=what, mismatches=wrong) if wrong else None


def _packed(tensor: Tensor) -> Tensor:
    """All elements one after the other; in one dimension a tensor of any strides is still itself."""
    flat = tensor.reshape(-1)
    return flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)


def in_layer(complaint: Complaint, layer: InMemory, index: int) -> Complaint:
    """The complaint with the layer that it is of, where that is not the case's own."""
    if index == 0:
        return complaint
    spec = layer.problem.case.spec
    place = f"in the other cache group (block_size {spec.block_size}, sliding_window {spec.sliding_window})"
    return replace(complaint, reason=f"{complaint.reason}, {place}" if complaint.reason else place)


def _apart(whole: Tensor, like: Outputs) -> dict[str, Tensor]:
    """What `bytes_of` put together, as outputs of these names and forms."""
    parts = whole.split([tensor.nbytes for tensor in like.values()])
    return {name: _like(tensor, part) for (name, tensor), part in zip(like.items(), parts, strict=True)}


def _like(tensor: Tensor, part: Tensor) -> Tensor:
    """The bytes, wherever they begin, as a tensor of this shape and dtype."""
    return part.clone().view(tensor.dtype).view(tensor.shape)


def _different(found: Outputs, wanted: Outputs, problem: Problem) -> tuple[Mismatch, ...]:
    dtypes = {name: tensor.dtype for name, tensor in wanted.items()}
    exact = Expected(values=dict(wanted), bounds={}, dtypes=dtypes, exact=True)
    return compare(dict(found), exact, problem)[0]


def _as_update(wanted: InMemory) -> Problem:
    """The step's problem with what names a place in a cache."""
    assert wanted.writing is not None
    arguments = {**wanted.problem.arguments, "slot_mapping": wanted.writing.slot_mapping}
    return replace(wanted.problem, arguments=arguments, pristine=wanted.caches)
