"""Which checks say something of a case. Knows cases only: neither torch nor a candidate."""

from __future__ import annotations

from .case import ATTENTION_OPERATIONS, Case


def why_not(case: Case) -> str | None:
    """Why the case's check says nothing of a case like this, in one sentence; None if it does."""
    if case.check == "repeat" and case.spec.operation not in (*ATTENTION_OPERATIONS, "merge_states"):
        return f"check: {case.spec.operation} is compared bit for bit, so repeating it says nothing more"
    return None
