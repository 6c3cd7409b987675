"""A case in a mode other than eager: captured on one step, judged after each of several others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bound.evaluate import Expected, evaluate
from ..candidate import Candidate, NumericContract, why_declined
from ..case import ATTENTION_OPERATIONS, Case
from ..checks import CandidateError
from ..compare import Ratios
from ..execution.eager import unzeroed_allocations
from ..execution.graphs.errors import DanglingPointer, NotEmulated
from ..execution.modes import RUNNERS, Runner
from ..verdict import Mismatch, Outcome
from .buffers import Buffers, InMemory, tensors_of
from .complaints import Complaint, complaint_of, other_bits
from .machines import machine_of
from .sequence import LARGE, SMALL, Step, steps_of
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
    counts: tuple[tuple[str, int], ...] = ()  # see `modes.Runner.counts`, over all buckets


@dataclass
class _Bucket:
    """Buffers, what was captured over them, and what they held last."""

    captured: Step
    buffers: Buffers
    runner: Runner
    last: Step


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
        matrix.release()
    counts = tuple(matrix.counts().items())
    if found is None:
        return Judgement(ratios=tuple(matrix.ratios.items()), counts=counts)
    wrong = found.mismatches
    check = case.mode if found.outcome is Outcome.REPLAY_DIFFERS else wrong[0].check if wrong else ""
    return Judgement(outcome=found.outcome, check=check, reason=found.reason, mismatches=wrong, counts=counts)


class _Matrix:
    """The replays of one case."""

    def __init__(self, case: Case, candidate: Candidate, contract: NumericContract, device: torch.device) -> None:
        self.case, self.candidate, self.contract = case, candidate, contract
        self.steps = steps_of(case)
        self.machine = machine_of(device, splits_update=bool(case.seed & 1))
        attends = case.spec.operation in ATTENTION_OPERATIONS
        self.updates = attends and why_declined(candidate, update_of(case)) is None
        self.buckets: dict[int, _Bucket] = {}
        self.answers: dict[Step, Expected] = {}
        self.ratios: dict[str, float] = {}
        self.held: dict[str, Tensor] = {}  # copies of the large bucket's last results

    def run(self) -> Complaint | None:
        """Capture, then replay; the first thing that is wrong."""
        for bucket in sorted({step.bucket for step in self.steps.replayed}):  # the large one first
            self.buckets[bucket] = self._captured(self.steps.captured[bucket])
        found = (self._replay(number, step) for number, step in enumerate(self.steps.replayed))
        return next((complaint for complaint in found if complaint is not None), None)

    def counts(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for bucket in self.buckets.values():
            total.update(bucket.runner.counts())
        return total

    def release(self) -> None:
        for bucket in self.buckets.values():
            bucket.runner.release()

    def _captured(self, step: Step) -> _Bucket:
        memory = self._tensors(step)
        buffers = Buffers(memory.problem, memory.writing)
        buffers.unwrite()
        with _blamed():
            runner = RUNNERS[self.case.mode](buffers.program(self.candidate.call), self.machine)
            self.machine.backend.synchronize()
        return _Bucket(step, buffers, runner, last=step)

    def _tensors(self, step: Step) -> InMemory:
        return tensors_of(step, self.machine.backend.device, updates=self.updates)

    def _replay(self, number: int, step: Step) -> Complaint | None:
        bucket, wanted = self.buckets[step.bucket], self._tensors(step)
        guards = bucket.buffers.refill(wanted)
        _churn(wanted)
        found = self._run(bucket.runner)
        expected = self._expected(step, wanted)
        if found is None:
            outputs = bucket.runner.outputs
            found, ratios = complaint_of(bucket.buffers, wanted, outputs, guards, expected)
            self.ratios.update({name: max(ratio, self.ratios.get(name, 0.0)) for name, ratio in ratios})
        plain = self._plain_outputs(wanted)
        if found is None and not expected.exact:
            found = other_bits(outputs, plain, wanted.problem, "other bits than a plain call's")
        if found is not None:
            also, _ = complaint_of(wanted, wanted, plain, wanted.problem.guards, expected)
            return also or self._at_replay(number, step, found)
        if (found := self._wrong_results(step, wanted)) is not None:
            return self._at_replay(number, step, found)
        bucket.last = step
        return None

    def _run(self, runner: Runner) -> Complaint | None:
        try:
            with _blamed():
                runner.run()
                self.machine.backend.synchronize()
        except DanglingPointer as error:
            return Complaint(outcome=Outcome.DIFFERS, reason=str(error))
        return None

    def _expected(self, step: Step, wanted: InMemory) -> Expected:
        """Evaluated once for each distinct step, when the candidate has run it for the first time."""
        expected = self.answers.get(step)
        if expected is None:
            expected = evaluate(wanted.problem, self.contract, with_statistics=not step.rewrites)
        if self.steps.replayed.count(step) > 1:
            self.answers[step] = expected
        return expected

    def _plain_outputs(self, wanted: InMemory) -> dict[str, Tensor]:
        """Of a plain call in the step's own memory, which is beside the captured one's."""
        wanted.unwrite()
        with _blamed(), unzeroed_allocations():
            outputs, _ = wanted.program(self.candidate.call)()
            self.machine.backend.synchronize()
        return outputs

    def _wrong_results(self, step: Step, wanted: InMemory) -> Complaint | None:
        """Of the tail, which has to have seen finished outputs.

        And of the large bucket, which were kept while the small one was captured: its replays leave them alone. Not
        the other way: what a graph captured later holds may lie where an earlier one has its scratch.
        """
        runner = self.buckets[step.bucket].runner
        found = other_bits(runner.results, runner.outputs, wanted.problem, "what reads the outputs")
        if found is None and step.bucket == SMALL and self.held:
            kept = self.buckets[LARGE].runner.results
            return other_bits(kept, self.held, wanted.problem, "results of another graph, held during this replay")
        if step.bucket == LARGE:
            self.held = {name: tensor.clone() for name, tensor in runner.results.items()}
        return found

    def _at_replay(self, number: int, step: Step, found: Complaint) -> Complaint:
        """The complaint with which replay it was, and what had changed."""
        bucket = self.buckets[step.bucket]
        batch = step.case.batch
        rows = f"{sum(batch.query_lens)} tokens in a bucket of {batch.num_tokens} and {batch.num_requests} requests"
        lines = [
            f"mode {self.case.mode}, replay {number + 1} of {len(self.steps.replayed)} ({step.profile}: {rows}), "
            f"after {bucket.last.profile}, captured on {bucket.captured.profile}; "
            f"{_changed(bucket.last, step)} changed; a plain call agrees",
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


@contextmanager
def _blamed() -> Iterator[None]:
    """What is raised in here is the candidate's, but for what the emulation has to say."""
    try:
        yield
    except (NotEmulated, DanglingPointer):
        raise
    except Exception as error:
        raise CandidateError from error
