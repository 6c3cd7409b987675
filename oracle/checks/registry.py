"""The checks by name."""

from __future__ import annotations

from collections.abc import Callable

from ..case import CHECKS
from .finding import Finding
from .groups import groups
from .interference import interference
from .must_read import must_read
from .ones import ones
from .orders import key_order, page_order, request_order
from .reads import reads
from .repeat import repeat
from .rescale import rescale
from .sequential import sequential
from .session import Session
from .shift import shift
from .split import split
from .swap import swap

Check = Callable[[Session], Finding | None]

_CHECKS: dict[str, Check] = {
    "repeat": repeat,
    "interference": interference,
    "must_read": must_read,
    "sequential": sequential,
    "key_order": key_order,
    "page_order": page_order,
    "request_order": request_order,
    "split": split,
    "ones": ones,
    "shift": shift,
    "rescale": rescale,
    "groups": groups,
    "swap": swap,
    "reads": reads,
}
assert set(CHECKS) == {"answer", *_CHECKS}


def ask(session: Session) -> Finding | None:
    """What the check that the session's case names has to say against the candidate; None if nothing."""
    check = session.problem.case.check
    return None if check == "answer" else _CHECKS[check](session)
