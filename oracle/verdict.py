"""The answer to one case: a typed value that cannot be dropped into an `if` by mistake."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .case import Case


class Outcome(StrEnum):
    AGREES = "agrees"
    DIFFERS = "differs"  # a value outside of the bound
    POISONED = "poisoned"  # NaN or Inf where a finite value was due
    UNWRITTEN = "unwritten"  # an output still holds what the oracle put there
    OUT_OF_BOUNDS = "out-of-bounds"  # a byte outside of the outputs changed
    NONDETERMINISTIC = "nondeterministic"
    REPLAY_DIFFERS = "replay-differs"
    CRASHED = "crashed"
    TIMED_OUT = "timed-out"
    DECLINED = "declined"
    KNOWN = "known"


FAILURES = frozenset(Outcome) - {Outcome.AGREES, Outcome.DECLINED, Outcome.KNOWN}


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """One output tensor that is not what it should be, described by its worst element."""

    output: str  # "out", "lse", "k_cache" ...
    outcome: Outcome
    count: int  # elements outside of the bound
    total: int
    index: tuple[int, ...]  # of the worst element
    actual: float
    expected: float
    bound: float
    where: str  # the same place in the batch's words: request, token, position, head, dim; or block, offset, slot
    dtype: str = ""  # of the output
    greatest: float = 0.0  # the largest absolute difference among the elements outside of their bound
    greatest_index: tuple[int, ...] = ()
    greatest_bound: float = 0.0  # what was allowed there


@dataclass(frozen=True, kw_only=True)
class Verdict:
    outcome: Outcome
    case: Case
    candidate: str
    reason: str = ""  # of a decline, a crash, an out-of-bounds write
    mismatches: tuple[Mismatch, ...] = ()
    ratios: tuple[tuple[str, float], ...] = ()  # output -> largest observed error / bound

    def __bool__(self) -> bool:
        raise TypeError("a Verdict has no truth value: look at .failed or .outcome, or call .require()")

    @property
    def failed(self) -> bool:
        return self.outcome in FAILURES

    def require(self) -> None:
        """Raise an AssertionError that says what differs, where, by how much, and how to replay it."""
        if self.failed:
            raise AssertionError(self.explain())

    def explain(self) -> str:
        """What torch.testing would say first, then where it is, what bounds it, and how to see it again."""
        from .wording import explain

        return explain(self)
