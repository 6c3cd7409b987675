"""The replays of one case: captured on one step, judged after each of several others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bound.evaluate import Expected, evaluate
from ..building.guards import Guards
from ..candidate import Candidate, NumericContract, why_declined
from ..case import ATTENTION_OPERATIONS, Case
from ..case_layers import layers_of
from ..execution.eager import unzeroed_allocations
from ..execution.graphs.errors import DanglingPointer
from ..execution.program import run_layers
from ..verdict import Outcome
from .buffers import InMemory, tensors_of
from .captures import Captured, Captures, blamed
from .complaints import Complaint, Outputs, bytes_of, complaint_of, in_layer, other_bits
from .machines import machine_of
from .sequence import Step, steps_of
from .writing import update_of

CHURNED_BYTES = 1 << 20  # arguments up to this size have their like allocated and overwritten between two steps


@dataclass(frozen=True)
class _Known:
    """A step that comes more than once, as far as it is the same each time; lists are by layer."""

    memory: list[InMemory]  # as built
    expected: list[Expected]
    plain: Tensor  # `bytes_of` a plain call's outputs


@dataclass(frozen=True)
class _Held:
    """Results of a replay, which stay what they are until their capture runs again."""

    taken: Captured
    results: Tensor  # their bytes, in memory of their own


class Matrix:
    """The replays of one case. Lists are by layer, one for each cache group."""

    def __init__(
        self, case: Case, candidate: Candidate, contracts: Sequence[NumericContract], device: torch.device
    ) -> None:
        self.case, self.candidate, self.contracts = case, candidate, contracts
        self.steps = steps_of(case)
        self.machine = machine_of(device, splits_update=bool(case.seed & 1))
        self.captures = Captures(case.mode, self.steps, candidate, self.machine)
        updates = [update_of(layer) for layer in layers_of(case) if case.spec.operation in ATTENTION_OPERATIONS]
        self.updates = bool(updates) and all(why_declined(candidate, update) is None for update in updates)
        self.known: dict[Step, _Known] = {}
        self.ratios: dict[str, float] = {}
        self.held: _Held | None = None

    def run(self) -> Complaint | None:
        """Capture, then replay; the first thing that is wrong."""
        used = {step.bucket for step in self.steps.replayed}
        for kind, step in self.steps.captures(self.case.mode):
            if step.bucket in used:
                self.captures.add(kind, step, self._tensors(step))
        found = (self._replay(number, step) for number, step in enumerate(self.steps.replayed))
        return next((complaint for complaint in found if complaint is not None), None)

    def counts(self) -> Counter[str]:
        """`Captures.counts`, and the steps whose layers were of two cache groups."""
        total = self.captures.counts()
        if self.case.cache_groups > 1:
            total["steps of two cache groups"] = len(self.steps.replayed)
        return total

    def _tensors(self, step: Step) -> list[InMemory]:
        device = self.machine.backend.device
        return [tensors_of(layer, device, updates=self.updates) for layer in step.layers]

    def _replay(self, number: int, step: Step) -> Complaint | None:
        taken, bucket = self.captures.for_step(step), self.captures.buckets[step.bucket]
        known = self.known.get(step)
        wanted = self._tensors(step) if known is None else known.memory
        bucket.refill(wanted)
        guards = [layer.guarded() for layer in bucket.buffers]
        bucket.unwrite(wanted)
        _churn(wanted)
        found = self._run(taken)
        if known is None:
            known = self._first_time(step, wanted)
        if found is None:
            found = self._complaint(bucket.buffers, known, taken.runner.outputs, guards)
        found = found or self._other_bits(taken, known) or self.captures.wrong_choice(step, taken)
        if found is not None:
            plain = self._plain_outputs(wanted)
            also = self._complaint(wanted, known, plain, [layer.problem.guards for layer in wanted])
            return also or self._at_replay(number, step, found, taken)
        bucket.last = step
        return None

    def _first_time(self, step: Step, wanted: list[InMemory]) -> _Known:
        """The answer is made here, when the candidate has run the step, in a capture and by a plain call."""
        plain = bytes_of(*self._plain_outputs(wanted))
        expected = []
        for layer, contract in zip(wanted, self.contracts, strict=True):
            layer.problem.guards.put_back()
            expected.append(evaluate(layer.problem, contract, with_statistics=not step.rewrites))
        known = _Known(wanted, expected, plain)
        if self.steps.replayed.count(step) > 1:
            self.known[step] = known
        return known

    def _run(self, taken: Captured) -> Complaint | None:
        try:
            with blamed():
                self.captures.run(taken)
                self.machine.backend.synchronize()
        except DanglingPointer as error:
            return Complaint(outcome=Outcome.DIFFERS, reason=str(error))
        return None

    def _complaint(
        self, ran: Sequence[InMemory], known: _Known, outputs: Sequence[Outputs], guards: Sequence[Guards]
    ) -> Complaint | None:
        """What is wrong in the first layer where something is; the ratios of those before it are kept."""
        for index, parts in enumerate(zip(ran, known.memory, outputs, guards, known.expected, strict=True)):
            complaint, ratios = complaint_of(*parts)
            if complaint is not None:
                return in_layer(complaint, known.memory[index], index)
            self.ratios.update({name: max(ratio, self.ratios.get(name, 0.0)) for name, ratio in ratios})
        return None

    def _plain_outputs(self, wanted: Sequence[InMemory]) -> list[dict[str, Tensor]]:
        """Of a plain call in the step's own memory, which is beside the captured one's."""
        for layer in wanted:
            layer.unwrite()
        with blamed(), unzeroed_allocations():
            outputs, _ = run_layers([layer.program(self.candidate.call) for layer in wanted])
            self.machine.backend.synchronize()
        return outputs

    def _other_bits(self, taken: Captured, known: _Known) -> Complaint | None:
        """Outputs that are not those of a plain call, and results of the tail, which has to have seen finished ones.

        And results of the step before, if it ran in an earlier capture: a replay leaves alone what was kept while it
        was captured. Not the other way: what a graph captured later holds may lie where an earlier one has its
        scratch.
        """
        runner, held = taken.runner, self.held
        outputs = bytes_of(*runner.outputs)
        asked = [("what reads the outputs", runner.results, outputs)]
        if held is not None and held.taken.number < taken.number:
            asked.append(("results of another graph, held during this replay", held.taken.runner.results, held.results))
        if not known.expected[0].exact:
            asked.insert(0, ("other bits than a plain call's", runner.outputs, known.plain))
        self.held = _Held(taken, bytes_of(*runner.results))
        seen = bytes_of(*(layer for _, found, _ in asked for layer in found))
        if torch.equal(seen, torch.cat([wanted for *_, wanted in asked])):
            return None
        return next(filter(None, (_wrong_bits(found, wanted, known, what) for what, found, wanted in asked)))

    def _at_replay(self, number: int, step: Step, found: Complaint, taken: Captured) -> Complaint:
        """The complaint with which replay it was, and what had changed."""
        last = self.captures.buckets[step.bucket].last
        batch = step.case.batch
        rows = f"{sum(batch.query_lens)} tokens in a bucket of {batch.num_tokens} and {batch.num_requests} requests"
        captured = "captured" if taken.kind == self.case.mode else f"dispatched to {taken.kind}, captured"
        lines = [
            f"mode {self.case.mode}, replay {number + 1} of {len(self.steps.replayed)} ({step.profile}: {rows}), "
            f"after {last.profile}, {captured} on {taken.step.profile}; "
            f"{_changed(last, step)} changed; a plain call agrees",
            found.outcome.value if not found.reason else f"{found.outcome.value}: {found.reason}",
        ]
        return replace(found, outcome=Outcome.REPLAY_DIFFERS, reason="\n".join(lines))


def _wrong_bits(found: Sequence[Outputs], wanted: Tensor, known: _Known, what: str) -> Complaint | None:
    """Of the first layer whose bytes are not those that are wanted."""
    sizes = [sum(tensor.nbytes for tensor in layer.values()) for layer in found]
    for index, (layer, part) in enumerate(zip(found, wanted.split(sizes), strict=True)):
        complaint = other_bits(layer, part, known.memory[index].problem, what)
        if complaint is not None:
            return in_layer(complaint, known.memory[index], index)
    return None


def _changed(before: Step, after: Step) -> str:
    old, new = before.case, after.case
    parts = {
        "query lengths": old.batch.query_lens != new.batch.query_lens,
        "sequence lengths": old.batch.seq_lens != new.batch.seq_lens,
        "pages and slots": old.seed != new.seed,
        "values": old.seed != new.seed or before.rewrites != after.rewrites,
    }
    return ", ".join(name for name, differs in parts.items() if differs) or "nothing"


def _churn(wanted: Sequence[InMemory]) -> None:
    """What goes on between two steps: others take the memory that was given back, and write to it."""
    for memory in (watch.memory for layer in wanted for watch in layer.problem.guards.watches):
        if memory.numel() * memory.element_size() <= CHURNED_BYTES:
            torch.full_like(memory, 0xFF if memory.dtype == torch.uint8 else -1)
