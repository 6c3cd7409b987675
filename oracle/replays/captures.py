"""The buffers of two buckets, what was captured over them, and which of the captures takes a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..candidate import Candidate, dispatch_of
from ..checks import CandidateError
from ..execution.compilations import Compilations
from ..execution.dispatch import FULL, dispatch
from ..execution.graphs.errors import DanglingPointer, NotEmulated
from ..execution.modes import RUNNERS, Machine, Runner
from ..verdict import Outcome
from .buffers import Buffers, InMemory
from .complaints import Complaint
from .sequence import Step, Steps


@dataclass
class Bucket:
    """Persistent buffers of every layer, and what they held last."""

    buffers: list[Buffers]
    last: Step

    def refill(self, memory: Sequence[InMemory]) -> None:
        for mine, theirs in zip(self.buffers, memory, strict=True):
            mine.refill(theirs)

    def unwrite(self, memory: Sequence[InMemory]) -> None:
        """Take out of the buffers what the updates of the step in them have to bring."""
        for mine, theirs in zip(self.buffers, memory, strict=True):
            theirs.unwrite(mine.caches)


@dataclass(frozen=True)
class Captured:
    """A step captured, or compiled, over a bucket's buffers."""

    kind: str  # of `modes.RUNNERS`
    step: Step  # what the buffers held
    runner: Runner
    number: int  # of those before it


class Captures:
    """All captures of a case, which share one pool of memory."""

    def __init__(self, mode: str, steps: Steps, candidate: Candidate, machine: Machine) -> None:
        self.buckets: dict[int, Bucket] = {}
        self._mode, self._steps = mode, steps
        self._candidate, self._machine = candidate, machine
        self._made: dict[tuple[str, int], Captured] = {}
        self._recompilations = Compilations()

    def add(self, kind: str, step: Step, memory: Sequence[InMemory]) -> None:
        """Capture a step, whose layers' tensors are `memory`, in one of the ways of `modes.RUNNERS`."""
        bucket = self.buckets.get(step.bucket)
        if bucket is None:
            buffers = [Buffers(layer.problem, layer.writing) for layer in memory]
            bucket = self.buckets[step.bucket] = Bucket(buffers, step)
        else:
            bucket.refill(memory)
        bucket.unwrite(memory)
        with blamed():
            layers = [layer.program(self._candidate.call) for layer in bucket.buffers]
            runner = RUNNERS[kind](layers, self._machine)
        bucket.last = step
        self._made[kind, step.bucket] = Captured(kind, step, runner, len(self._made))

    def for_step(self, step: Step) -> Captured:
        """The one that takes the step: its bucket's, or of the two that it has the one that the candidate chooses."""
        kind = self._mode
        if self._steps.query_len:
            with blamed():
                kind = dispatch_of(self._candidate, step.case.batch.query_lens, self._steps.query_len)
        return self._made[kind, step.bucket]

    def run(self, taken: Captured) -> None:
        """Once more, on what its buffers hold. Does not wait for the device."""
        with self._recompilations:
            taken.runner.run()

    def wrong_choice(self, step: Step, taken: Captured) -> Complaint | None:
        """What is wrong about the capture that took this step, whatever came of it."""
        query_lens, captured = step.case.batch.query_lens, self._steps.query_len
        if not captured or taken.kind == (due := dispatch(query_lens, captured)):
            return None
        return Complaint(
            outcome=Outcome.REPLAY_DIFFERS,
            reason=f"found the step in the {taken.kind} capture, expected it in the {due} one: "
            f"query lengths {query_lens}, uniform ones up to {captured} were captured",
        )

    def counts(self) -> Counter[str]:
        """`Runner.counts` over all of them; where steps are dispatched, replays by kind.

        And where Python runs at a step, how often torch compiled something in it that was not compiled before.
        """
        total: Counter[str] = Counter()
        for taken in self._made.values():
            prefix = "" if taken.kind == self._mode else f"{taken.kind} "
            for what, times in taken.runner.counts().items():
                total[prefix + what if what == "replays" else what] += times
        if self._mode != FULL:
            total["recompilations"] = self._recompilations.made
        return total

    def release(self) -> None:
        for taken in self._made.values():
            taken.runner.release()


@contextmanager
def blamed() -> Iterator[None]:
    """What is raised in here is the candidate's, but for what the emulation has to say."""
    try:
        yield
    except (NotEmulated, DanglingPointer):
        raise
    except Exception as error:
        raise CandidateError from error


@contextmanager
def faults_blamed() -> Iterator[None]:
    """Faults of the device are the candidate's; they show wherever it is waited for next, or asked for anything."""
    try:
        yield
    except RuntimeError as error:
        if "CUDA error" not in str(error):
            raise
        raise CandidateError from error
