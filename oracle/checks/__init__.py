"""What is asked of a candidate beyond the one answer: relations between several of its own runs, and what it read.

A case names at most one of them (`Case.check`). It is asked after the answer itself was found to agree.
"""

from __future__ import annotations

from .finding import Finding
from .registry import ask
from .session import CandidateError, Session

__all__ = ["CandidateError", "Finding", "Session", "ask"]
