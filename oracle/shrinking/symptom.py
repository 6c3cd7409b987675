"""What two failures must have in common to be taken for the same fault; never a number, never a shape."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..verdict import FAILURES, ORACLE_FAILED, Outcome, Verdict

# The line of a traceback that names what was raised; its message may go on for lines after that.
_RAISED = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Unusable)\w*)(?::|$)")


class Symptom(NamedTuple):
    """How a failure shows."""

    operation: str
    outcome: str
    check: str  # which check failed; "" where the call itself did
    outputs: str  # those that are wrong, by name
    direction: str  # of the fault: "missing key", "extra key" ..., or what was raised; "" where nothing is known


def symptom_of(verdict: Verdict) -> Symptom:
    """The symptom of a verdict; of one that has not failed, one that no failure shares."""
    wrong = [mismatch for mismatch in verdict.mismatches if mismatch.outcome in FAILURES]
    direction = next((mismatch.direction for mismatch in wrong if mismatch.direction), "")
    return Symptom(
        operation=verdict.case.spec.operation,
        outcome=verdict.outcome.value,
        check=verdict.check,
        outputs=", ".join(mismatch.output for mismatch in wrong),
        direction=_manner(verdict.reason) if verdict.outcome is Outcome.CRASHED else direction,
    )


def _manner(reason: str) -> str:
    """How it crashed: the exception's name, or how the process ended."""
    lines = reason.splitlines()
    raised = next((found[1] for line in reversed(lines) if (found := _RAISED.match(line))), "")
    if reason.startswith(ORACLE_FAILED):
        return f"{ORACLE_FAILED}: {raised}"
    return raised or (lines[0] if len(lines) == 1 else "")
