"""The same call again gives the same bits."""

from __future__ import annotations

from ..formats import INTEGERS
from ..locate import locate
from ..verdict import Outcome
from .finding import Finding
from .session import Session


def repeat(session: Session) -> Finding | None:
    """A second run on the same arguments, in other memory, differs in no bit."""
    again = session.run()
    for name, tensor in session.actual.items():
        integers = INTEGERS[tensor.element_size()]
        differs = tensor.contiguous().view(integers) != again[name].view(integers)
        if bool(differs.any()):
            index = tuple(int(part) for part in differs.nonzero()[0])
            count = int(differs.sum())
            where = locate(session.problem, name, index)
            return Finding(
                Outcome.NONDETERMINISTIC,
                f"{name}: {count} of {differs.numel()} elements have other bits in a second run, the first at {where}",
            )
    return None
