"""A case in a mode other than eager, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..candidate import Candidate, NumericContract, why_declined
from ..case import Case
from ..case_layers import layers_of
from ..compare import Ratios
from ..execution.graphs.errors import NotEmulated
from ..verdict import Mismatch, Outcome
from .captures import blamed
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


def judge_replays(case: Case, candidate: Candidate, contract: NumericContract, device: torch.device) -> Judgement:
    """Run the case's steps in its mode. Raises CandidateError for what the candidate raises.

    After every replay the outputs are held to the bits of a plain call on buffers of the same size, the caches and
    everything else to what they should hold, bit for bit; to the reference they are held for many steps at once
    (`answers.py`). What is wrong in a plain call as well
    is reported as what it is there; what only a replay does is `replay-differs`.
    """
    contracts = [contract]
    with blamed():
        for layer in layers_of(case)[1:]:
            if (reason := why_declined(candidate, layer)) is not None:
                return Judgement(outcome=Outcome.DECLINED, reason=f"the other cache group: {reason}")
            contracts.append(candidate.contract(layer))
    matrix = Matrix(case, candidate, contracts, device)
    try:
        found = matrix.run()
    except NotEmulated as error:
        return Judgement(outcome=Outcome.DECLINED, reason=f"not emulated on a CPU: {error}")
    finally:
        matrix.captures.release()
    counts = tuple(matrix.counts().items())
    if found is None:
        return Judgement(ratios=tuple(matrix.answers.ratios.items()), counts=counts)
    wrong = found.mismatches
    check = case.mode if found.outcome is Outcome.REPLAY_DIFFERS else wrong[0].check if wrong else ""
    return Judgement(outcome=found.outcome, check=check, reason=found.reason, mismatches=wrong, counts=counts)
