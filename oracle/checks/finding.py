"""What a check that failed says."""

from __future__ import annotations

from dataclasses import dataclass

from ..verdict import Outcome


@dataclass(frozen=True)
class Finding:
    """An outcome that is a failure, and a sentence that says what differs where; or declined, and why."""

    outcome: Outcome
    reason: str
