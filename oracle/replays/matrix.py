"""The replays of one case: captured on one step, looked at after each of several others, judged together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from ..building.guards import Guards
from ..candidate import Candidate, NumericContract, why_declined
from ..case import ATTENTION_OPERATIONS, Case
from ..case_layers import layers_of
from ..checks import CandidateError
from ..execution.eager import unzeroed_allocations
from ..execution.graphs.errors import DanglingPointer, NotEmulated
from ..execution.program import run_layers
from ..questions import Reply
from ..verdict import Outcome
from .answers import Answers, Known
from .bits import Bits
from .buffers import InMemory, tensors_of
from .captures import Captured, Captures, blamed
from .complaints import Complaint, Kept, Outputs, complaint_of, in_layer, wrong_values
from .looks import Look, Looks
from .machines import machine_of
from .replay import Replay
from .sequence import Step, steps_of
from .writing import update_of

CHURNED_BYTES = 1 << 20  # arguments up to this size have their like allocated and overwritten between two steps


class Matrix:
    """The replays of one case. Lists are by layer, one for each cache group."""

    def __init__(
        self, case: Case, candidate: Candidate, contracts: Sequence[NumericContract], device: torch.device
    ) -> None:
        self.case, self.candidate = case, candidate
        self.steps = steps_of(case)
        self.machine = machine_of(device, splits_update=bool(case.seed & 1))
        self.captures = Captures(case.mode, self.steps, candidate, self.machine)
        updates = [update_of(layer) for layer in layers_of(case) if case.spec.operation in ATTENTION_OPERATIONS]
        self.updates = bool(updates) and all(why_declined(candidate, update) is None for update in updates)
        self.known: dict[Step, Known] = {}  # those that come more than once
        self.answers = Answers(contracts)
        self.bits = Bits()
        self.looks = Looks()

    def run(self) -> Complaint | None:
        """Capture, then replay; the first thing that is wrong, as far as the device and the reference were asked.

        See `looked_back` and `finish`. Does not wait for the device, unless what replays leave is large.
        """
        used = {step.bucket for step in self.steps.replayed}
        for kind, step in self.steps.captures(self.case.mode):
            if step.bucket in used:
                self.captures.add(kind, step, self._tensors(step))
        found = (self._replay(number, step) for number, step in enumerate(self.steps.replayed))
        try:
            return next(filter(None, found), None)
        except (CandidateError, NotEmulated):
            with suppress(RuntimeError):  # of a device that is of no use any more
                if (earlier := self._settle()) is not None:
                    return earlier
            raise

    def looked_back(self) -> Complaint | None:
        """What is wrong with the first replay that left what it may not leave; the device is asked about all."""
        for look in self.looks.changed():
            if (earlier := self._looked_into(self.answers.settle(before=look.replay.number))) is not None:
                return earlier
            look.put_back()
            if (found := self._looked_at(look)) is not None:
                return found
        return None

    def finish(self, replies: Sequence[Reply]) -> Complaint | None:
        """What is wrong in the steps that wait, given what the reference says to the questions about them."""
        return self._looked_into(self.answers.hear(replies))

    def forget(self) -> None:
        """Let go of the buffers, when it was looked back; the steps that wait have memory of their own."""
        self.captures.buckets.clear()
        self.known.clear()
        self.looks.clear()

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
        replay = Replay(number, step, bucket.last, taken)
        known = self.known.get(step)
        wanted = self._tensors(step) if known is None else known.as_built()
        bucket.refill(wanted)
        guards = [layer.guarded() for layer in bucket.buffers]
        bucket.unwrite(wanted)
        _churn(wanted)
        dangling = self._run(taken)
        if known is None:
            known = Known(replay, wanted, Kept.of(self._plain_outputs(wanted)))
            if self.steps.replayed.count(step) > 1:
                self.known[step] = known
        bucket.last = step
        return self._judged(replay, known, guards, dangling)

    def _judged(
        self, replay: Replay, known: Known, guards: Sequence[Guards], dangling: Complaint | None
    ) -> Complaint | None:
        """What is wrong, as far as that shows at once; the device and the reference are asked later, of many steps."""
        if dangling is not None:
            return self._settle() or self._told(replay, known, dangling)
        outputs, seen = self.bits.after(replay.taken, known)
        look = Look(replay, known, guards, outputs, seen, [layer.small_now() for layer in guards])
        if look.has_another_form or self.captures.wrong_choice(replay.step, replay.taken):
            return self._settle() or self._looked_at(look)
        self.looks.add(look)
        if known.replay is replay:
            self.answers.wait(known)
        if self.answers.is_due:
            return self._settle()
        return self.looked_back() if self.looks.are_due else None

    def _settle(self) -> Complaint | None:
        """What is wrong in the steps that wait for the device or the reference to be asked about them."""
        return self.looked_back() or self._looked_into(self.answers.settle())

    def _looked_into(self, doubtful: Sequence[Known]) -> Complaint | None:
        """What is wrong in steps whose answer is there: a plain call has the same bits."""
        for known in doubtful:
            for index, parts in enumerate(zip(known.memory, known.plain.tensors(), known.expected, strict=True)):
                complaint, ratios = wrong_values(*parts)
                if complaint is not None:
                    return self._told(known.replay, known, in_layer(complaint, known.memory[index], index))
                self.answers.keep(ratios)
        return None

    def _looked_at(self, look: Look) -> Complaint | None:
        """What is wrong with one replay, of which the memories hold what it left there, by the reference too."""
        replay, known = look.replay, look.known
        self.answers.ask(known)
        buffers = self.captures.buckets[replay.step.bucket].buffers
        found = self._complaint(buffers, known, look.outputs.tensors(), look.guards)
        found = found or look.wrong_bits() or self.captures.wrong_choice(replay.step, replay.taken)
        return None if found is None else self._told(replay, known, found)

    def _told(self, replay: Replay, known: Known, found: Complaint) -> Complaint:
        """What is wrong in a plain call as well, as what it is there; else what only this replay does."""
        self.answers.ask(known)
        plain, wanted = self._plain_outputs(known.memory), known.memory
        also = self._complaint(wanted, known, plain, [layer.problem.guards for layer in wanted])
        return also or replay.blamed(found, self.case.mode, len(self.steps.replayed))

    def _run(self, taken: Captured) -> Complaint | None:
        """Without waiting for the device: whoever asks it next does."""
        try:
            with blamed():
                self.captures.run(taken)
        except DanglingPointer as error:
            return Complaint(outcome=Outcome.DIFFERS, reason=str(error))
        return None

    def _complaint(
        self, ran: Sequence[InMemory], known: Known, outputs: Sequence[Outputs], guards: Sequence[Guards]
    ) -> Complaint | None:
        """What is wrong in the first layer where something is; the ratios of those before it are kept."""
        for index, parts in enumerate(zip(ran, known.memory, outputs, guards, known.expected, strict=True)):
            complaint, ratios = complaint_of(*parts)
            if complaint is not None:
                return in_layer(complaint, known.memory[index], index)
            self.answers.keep(ratios)
        return None

    def _plain_outputs(self, wanted: Sequence[InMemory]) -> list[dict[str, Tensor]]:
        """Of a plain call in the step's own memory, which is beside the captured one's."""
        for layer in wanted:
            layer.unwrite()
        with blamed(), unzeroed_allocations():
            outputs, _ = run_layers([layer.program(self.candidate.call) for layer in wanted])
        return outputs


def _churn(wanted: Sequence[InMemory]) -> None:
    """What goes on between two steps: others take the memory that was given back, and write to it."""
    memories = (watch.memory.view(torch.uint8) for layer in wanted for watch in layer.problem.guards.watches)
    taken = [torch.empty_like(memory) for memory in memories if len(memory) <= CHURNED_BYTES]
    if taken:
        written = torch.full_like(max(taken, key=len), 0xFF)
        torch._foreach_copy_(taken, [written[: len(memory)] for memory in taken])
