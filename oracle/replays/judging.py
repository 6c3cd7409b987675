"""A case in a mode other than eager, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..candidate import Candidate, NumericContract, why_declined
from ..case import Case
from ..case_layers import layers_of
from ..compare import Ratios
from ..execution.graphs.errors import NotEmulated
from ..questions import Question, Reply
from ..verdict import Mismatch, Outcome
from .captures import blamed, faults_blamed
from .complaints import Complaint
from .matrix import Matrix


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What came of a case in its mode."""

    outcome: Outcome = Outcome.AGREES
    check: str = ""
    reason: str = ""
    mismatches: tuple[Mismatch, ...] = ()
    ratios: Ratios = ()
    counts: tuple[tuple[str, int], ...] = ()  # see `Matrix.counts`


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A case that was replayed: what is left is to ask the device what replays left, and the reference."""

    matrix: Matrix
    counts: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        """What waits in memory, and its evaluation will take, roughly."""
        return self.matrix.answers.bytes + self.matrix.looks.bytes

    def difference(self) -> Tensor | None:
        """[] bool on the device: whether a replay left what it may not leave. None: that is known of none."""
        return self.matrix.looks.difference()

    def violation(self) -> Judgement | None:
        """What that is, if anything. Raises CandidateError for what the candidate raises, if it is run again."""
        with faults_blamed():
            found = self.matrix.looked_back()
        return None if found is None else _judgement(self.matrix, found, self.counts)

    def questions(self) -> list[Question]:
        """When it is known that the replays left what they have to leave: lets go of all that they ran in."""
        self.matrix.forget()
        return self.matrix.answers.questions()

    def judgement(self, replies: Sequence[Reply]) -> Judgement:
        """Given the reply to each question. Raises what `violation` raises."""
        return _judgement(self.matrix, self.matrix.finish(replies), self.counts)


def run_replays(
    case: Case, candidate: Candidate, contract: NumericContract, device: torch.device
) -> Replayed | Judgement:
    """Run the case's steps in its mode. Raises CandidateError for what the candidate raises.

    After every replay the outputs are held to the bits of a plain call on buffers of the same size, the caches and
    everything else to what they should hold, bit for bit; to the reference they are held for many steps at once
    (`answers.py`). What is wrong in a plain call as well is reported as what it is there; what only a replay does is
    `replay-differs`.
    """
    contracts = [contract]
    with blamed():
        for layer in layers_of(case)[1:]:
            if (reason := why_declined(candidate, layer)) is not None:
                return Judgement(outcome=Outcome.DECLINED, reason=f"the other cache group: {reason}")
            contracts.append(candidate.contract(layer))
    matrix = Matrix(case, candidate, contracts, device)
    try:
        with faults_blamed():
            found = matrix.run()
    except NotEmulated as error:
        return Judgement(outcome=Outcome.DECLINED, reason=f"not emulated on a CPU: {error}")
    finally:
        matrix.captures.release()  # CUDA frees a graph that still runs when it is done
    counts = tuple(matrix.counts().items())
    return Replayed(matrix=matrix, counts=counts) if found is None else _judgement(matrix, found, counts)


def _judgement(matrix: Matrix, found: Complaint | None, counts: tuple[tuple[str, int], ...]) -> Judgement:
    if found is None:
        return Judgement(ratios=tuple(matrix.answers.ratios.items()), counts=counts)
    wrong = found.mismatches
    replayed = found.outcome is Outcome.REPLAY_DIFFERS
    check = matrix.case.mode if replayed else wrong[0].check if wrong else ""
    return Judgement(outcome=found.outcome, check=check, reason=found.reason, mismatches=wrong, counts=counts)
