"""Which of two parts comes first makes no difference beyond rounding."""

from __future__ import annotations

from .comparison import twice_bounded, within
from .finding import Finding
from .session import Session


def swap(session: Session) -> Finding | None:
    """merge_states(b, a) is merge_states(a, b), within the bounds of both."""
    given = session.arguments
    names = (("out_a", "out_b"), ("lse_a", "lse_b"))
    changes = {name: given[other] for pair in names for name, other in (pair, pair[::-1])}
    again = session.run(session.changed(**changes))
    return within(session, again, "when the parts are swapped", twice_bounded(session))
