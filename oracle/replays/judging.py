"""A case in a mode other than eager: captured on one step, judged after each of several others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bound.evaluate import Expected, evaluate
from ..candidate import Candidate, NumericContract, why_declined
from ..case import ATTENTION_OPERATIONS, Case
from ..compare import Ratios
from ..execution.eager import unzeroed_allocations
from ..execution.graphs.errors import DanglingPointer, NotEmulated
from ..verdict import Mismatch, Outcome
from .buffers import InMemory, tensors_of
from .captures import Captured, Captures, blamed
from .complaints import Complaint, bytes_of, complaint_of, other_bits
from .machines import machine_of
from .sequence import Step, steps_of
from .writing import update_of

CHURNED_BYTES = 1 << 20  # arguments up to this size have their like allocated and overwritten between two steps


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What came of a case in its mode."""

    outcome: Outcome = Outcome.AGREES
    check: str = ""
    reason: str = ""
    mismatches: tuple[Mismatch, ...] = ()
    ratios: Ratios = ()
    counts: tuple[tuple[str, int], ...] = ()  # see `Captures.counts`


def judge_replays(case: Case, candidate: Candidate, contract: NumericContract, device: torch.device) -> Judgement:
    """Run the case's steps in its mode. Raises CandidateError for what the candidate raises.

    After every replay the outputs are held to the reference and to the bits of a plain call on buffers of the same
    size, the caches and everything else to what they should hold, bit for bit. What is wrong in a plain call as well
    is reported as what it is there; what only a replay does is `replay-differs`.
    """
    matrix = _Matrix(case, candidate, contract, device)
    try:
        found = matrix.run()
    except NotEmulated as error:
        return Judgement(outcome=Outcome.DECLINED, reason=f"not emulated on a CPU: {error}")
    finally:
        matrix.captures.release()
    counts = tuple(matrix.captures.counts().items())
    if found is None:
        return Judgement(ratios=tuple(matrix.ratios.items()), counts=counts)
    wrong = found.mismatches
    check = case.mode if found.outcome is Outcome.REPLAY_DIFFERS else wrong[0].check if wrong else ""
    return Judgement(outcome=found.outcome, check=check, reason=found.reason, mismatches=wrong, counts=counts)


@dataclass(frozen=True)
class _Known:
    """A step that comes more than once, as far as it is the same each time."""

    memory: InMemory  # as built
    expected: Expected
    plain: Tensor  # `bytes_of` a plain call's outputs


@dataclass(frozen=True)
class _Held:
    """Results of a replay, which stay what they are until their capture runs again."""

    taken: Captured
    results: Tensor  # their bytes, in memory of their own


class _Matrix:
    """The replays of one case."""

    def __init__(self, case: Case, candidate: Candidate, contract: NumericContract, device: torch.device) -> None:
        self.case, self.candidate, self.contract = case, candidate, contract
        self.steps = steps_of(case)
        self.machine = machine_of(device, splits_update=bool(case.seed & 1))
        self.captures = Captures(case.mode, self.steps, candidate, self.machine)
        attends = case.spec.operation in ATTENTION_OPERATIONS
        self.updates = attends and why_declined(candidate, update_of(case)) is None
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

    def _tensors(self, step: Step) -> InMemory:
        return tensors_of(step, self.machine.backend.device, updates=self.updates)

    def _replay(self, number: int, step: Step) -> Complaint | None:
        taken, bucket = self.captures.for_step(step), self.captures.buckets[step.bucket]
        known = self.known.get(step)
        wanted = self._tensors(step) if known is None else known.memory
        bucket.buffers.refill(wanted)
        guards = bucket.buffers.guarded()
        wanted.unwrite(bucket.buffers.caches)
        _churn(wanted)
        found = self._run(taken)
        if known is None:
            known = self._first_time(step, wanted)
        if found is None:
            found, ratios = complaint_of(bucket.buffers, wanted, taken.runner.outputs, guards, known.expected)
            self.ratios.update({name: max(ratio, self.ratios.get(name, 0.0)) for name, ratio in ratios})
        found = found or self._other_bits(taken, known) or self.captures.wrong_choice(step, taken)
        if found is not None:
            plain = self._plain_outputs(wanted)
            also, _ = complaint_of(wanted, wanted, plain, wanted.problem.guards, known.expected)
            return also or self._at_replay(number, step, found, taken)
        bucket.last = step
        return None

    def _first_time(self, step: Step, wanted: InMemory) -> _Known:
        """The answer is made here, when the candidate has run the step, in a capture and by a plain call."""
        plain = bytes_of(self._plain_outputs(wanted))
        wanted.problem.guards.put_back()
        expected = evaluate(wanted.problem, self.contract, with_statistics=not step.rewrites)
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

    def _plain_outputs(self, wanted: InMemory) -> dict[str, Tensor]:
        """Of a plain call in the step's own memory, which is beside the captured one's."""
        wanted.unwrite()
        with blamed(), unzeroed_allocations():
            outputs, _ = wanted.program(self.candidate.call)()
            self.machine.backend.synchronize()
        return outputs

    def _other_bits(self, taken: Captured, known: _Known) -> Complaint | None:
        """Outputs that are not those of a plain call, and results of the tail, which has to have seen finished ones.

        And results of the step before, if it ran in an earlier capture: a replay leaves alone what was kept while it
        was captured. Not the other way: what a graph captured later holds may lie where an earlier one has its
        scratch.
        """
        runner, held = taken.runner, self.held
        outputs = bytes_of(runner.outputs)
        asked = [("what reads the outputs", runner.results, outputs)]
        if held is not None and held.taken.number < taken.number:
            asked.append(("results of another graph, held during this replay", held.taken.runner.results, held.results))
        if not known.expected.exact:
            asked.insert(0, ("other bits than a plain call's", runner.outputs, known.plain))
        self.held = _Held(taken, bytes_of(runner.results))
        if torch.equal(bytes_of(*(found for _, found, _ in asked)), torch.cat([wanted for *_, wanted in asked])):
            return None
        problem = known.memory.problem
        return next(filter(None, (other_bits(found, wanted, problem, what) for what, found, wanted in asked)))

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


def _changed(before: Step, after: Step) -> str:
    old, new = before.case, after.case
    parts = {
        "query lengths": old.batch.query_lens != new.batch.query_lens,
        "sequence lengths": old.batch.seq_lens != new.batch.seq_lens,
        "pages and slots": old.seed != new.seed,
        "values": old.seed != new.seed or before.rewrites != after.rewrites,
    }
    return ", ".join(name for name, differs in parts.items() if differs) or "nothing"


def _churn(wanted: InMemory) -> None:
    """What goes on between two steps: others take the memory that was given back, and write to it."""
    for memory in (watch.memory for watch in wanted.problem.guards.watches):
        if memory.numel() * memory.element_size() <= CHURNED_BYTES:
            torch.full_like(memory, 0xFF if memory.dtype == torch.uint8 else -1)
