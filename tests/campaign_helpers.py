"""Judges and candidates for tests of the campaign, importable by its worker processes. No tensors, no kernels."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from pageproof.oracle.candidate import NumericContract
from pageproof.oracle.case import Case
from pageproof.oracle.verdict import Mismatch, Outcome, Verdict

# Flags of a campaign that its `--cases` end, however busy the machine is.
FEW = ["--device", "cpu", "--seconds", "600", "--workers", "1"]

# By a given case's seed: what becomes of it.
AGREES, DIFFERS, DIES, LEAVES, HANGS, RAISES, DECLINED = range(7)


class Fake:
    """A candidate that nobody calls; the judges below only ask what it declines."""

    name = "fake"

    def notes(self) -> list[str]:
        return ["a note of the candidate"]

    def declines(self, case: Case) -> str | None:
        return None

    def contract(self, case: Case) -> NumericContract:
        return NumericContract()

    def call(self, operation: str, arguments: dict[str, Any]) -> None:
        raise NotImplementedError


class Picky(Fake):
    """Accepts neither float8 queries, nor ALiBi beside sinks."""

    def declines(self, case: Case) -> str | None:
        if case.spec.q_dtype:
            return "no float8 queries"
        return "no alibi beside sinks" if case.spec.alibi and case.spec.sinks else None


class Unwilling(Fake):
    def declines(self, case: Case) -> str | None:
        return "never"


class Wrong(Fake):
    """Writes nothing."""

    name = "wrong"

    def call(self, operation: str, arguments: dict[str, Any]) -> None:
        return None


def broken_with_sinks(case: Case, candidate: Fake, device: object) -> Verdict:
    """Differs wherever sinks meet a softcap; agrees elsewhere, with a ratio that says which case it was."""
    reason = candidate.declines(case)
    if reason is not None:
        return Verdict(outcome=Outcome.DECLINED, case=case, candidate=candidate.name, reason=reason)
    if case.spec.sinks and case.spec.softcap is not None:
        return differs(case)
    ratios = (("out", case.seed / 2**32), ("lse", 0.5))
    return Verdict(outcome=Outcome.AGREES, case=case, candidate=candidate.name, ratios=ratios)


def agreeing(case: Case, candidate: Fake, device: object) -> Verdict:
    return Verdict(outcome=Outcome.AGREES, case=case, candidate=candidate.name, ratios=(("out", case.seed / 2**32),))


def declining_at_random(case: Case, candidate: Fake, device: object) -> Verdict:
    """One case of six is declined, for a reason that lies in its seed."""
    if case.seed % 6:
        return agreeing(case, candidate, device)
    return Verdict(outcome=Outcome.DECLINED, case=case, candidate=candidate.name, reason="by chance")


def by_seed(case: Case, candidate: Fake, device: object) -> Verdict:
    """What the case's seed says."""
    if case.seed == DIFFERS:
        return differs(case)
    if case.seed == DIES:
        os.kill(os.getpid(), signal.SIGSEGV)
    if case.seed == LEAVES:
        os._exit(3)
    if case.seed == HANGS:
        time.sleep(600)
    if case.seed == RAISES:
        raise RuntimeError("a fault of the judge")
    if case.seed == DECLINED:
        return Verdict(outcome=Outcome.DECLINED, case=case, candidate=candidate.name, reason="not here")
    return agreeing(case, candidate, device)


def leaves_with_sinks(case: Case, candidate: Fake, device: object) -> Verdict:
    """Takes its process along wherever there are sinks; differs beside ALiBi alone, which is another fault."""
    if case.spec.sinks:
        os._exit(3)
    return differs(case) if case.spec.alibi else agreeing(case, candidate, device)


def hangs_with_two_tokens(case: Case, candidate: Fake, device: object) -> Verdict:
    if case.batch.num_tokens > 1:
        time.sleep(600)
    return agreeing(case, candidate, device)


def differs_once(case: Case, candidate: Fake, device: object) -> Verdict:
    """Only the first case of a process differs: what is left from an earlier one decides."""
    before = len(_SEEN)
    _SEEN.append(case)
    return agreeing(case, candidate, device) if before else differs(case)


_SEEN: list[Case] = []


def differs(case: Case) -> Verdict:
    mismatch = Mismatch(
        output="out",
        outcome=Outcome.DIFFERS,
        count=1,
        total=2,
        index=(0,),
        actual=1.0,
        expected=0.0,
        bound=0.1,
        where="here",
    )
    return Verdict(outcome=Outcome.DIFFERS, case=case, candidate="fake", mismatches=(mismatch,))
