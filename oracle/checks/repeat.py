"""The same call again gives the same bits."""

from __future__ import annotations

from ..verdict import Outcome
from .comparison import same_bits
from .finding import Finding
from .session import Session


def repeat(session: Session) -> Finding | None:
    """A second run on the same arguments, in other memory, differs in no bit."""
    return same_bits(session, session.run(), "in a second run", outcome=Outcome.NONDETERMINISTIC)
