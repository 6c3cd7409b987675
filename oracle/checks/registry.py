"""The checks by name."""

from __future__ import annotations

from collections.abc import Callable

from ..case import CHECKS
from .finding import Finding
from .reads import reads
from .repeat import repeat
from .session import Session

Check = Callable[[Session], Finding | None]

_CHECKS: dict[str, Check] = {"repeat": repeat, "reads": reads}
assert set(CHECKS) == {"answer", *_CHECKS}


def ask(session: Session) -> Finding | None:
    """What the check that the session's case names has to say against the candidate; None if nothing."""
    check = session.problem.case.check
    return None if check == "answer" else _CHECKS[check](session)
