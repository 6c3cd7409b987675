"""The answer to one case: a typed value that cannot be dropped into an `if` by mistake, and what it says in words.

In words it is torch.testing's familiar lines, then the place, the bound, and the line that replays it.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from enum import StrEnum

from .case import Case


class Outcome(StrEnum):
    AGREES = "agrees"
    DIFFERS = "differs"  # a value outside of the bound
    POISONED = "poisoned"  # NaN or Inf where a finite value was due
    UNWRITTEN = "unwritten"  # an output still holds what the oracle put there
    OUT_OF_BOUNDS = "out-of-bounds"  # a byte outside of the outputs changed
    WRONG_ACCESS = "wrong-access"  # a kernel touched what it may not, or left what it has to touch
    NONDETERMINISTIC = "nondeterministic"
    REPLAY_DIFFERS = "replay-differs"
    CRASHED = "crashed"
    TIMED_OUT = "timed-out"
    DECLINED = "declined"
    NOT_JUDGED = "not-judged"  # there was no device memory for it: nothing is known about this case
    KNOWN = "known"


FAILURES = frozenset(Outcome) - {Outcome.AGREES, Outcome.DECLINED, Outcome.NOT_JUDGED, Outcome.KNOWN}

ORACLE_FAILED = "the oracle itself failed"  # how the reason of a crash begins that is not the candidate's

_SAYS = {
    Outcome.DIFFERS: "outside of its bound",
    Outcome.POISONED: (
        "not finite where a finite value was due: something that must not be read was, or a row saw nothing"
    ),
    Outcome.UNWRITTEN: "never written: it still holds the NaN it was born with",
}

_TOO_LARGE_TOGETHER = (
    "each error is inside of its bound, but together they are larger than the declared roundings can make them"
)
_SAYS_CHECK = {
    "sub-gaussian": "inside of its hard bound, but outside of what independent roundings make likely",
    "row z": f"{_TOO_LARGE_TOGETHER}, within a row",
    "case z": f"{_TOO_LARGE_TOGETHER}, over the whole case",
}


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
    check: str = "bound"  # what it is outside of: the hard "bound", "sub-gaussian", "row z", "case z"
    dtype: str = ""  # of the output
    greatest: float = 0.0  # the largest absolute difference among the elements outside of their bound
    greatest_index: tuple[int, ...] = ()
    greatest_bound: float = 0.0  # what was allowed there
    direction: str = ""  # what would explain the worst row: "missing key" and the like (`diagnose.DIRECTIONS`)
    hint: str = ""  # the same as a sentence that names the key


@dataclass(frozen=True, kw_only=True)
class Verdict:
    outcome: Outcome
    case: Case
    candidate: str  # its name
    target: str = ""  # what `adapters.find` knows it by; "" for a candidate that did not come from there
    check: str = ""  # which check failed: a mismatch's, or one of case.CHECKS
    reason: str = ""  # of a decline, a crash, an out-of-bounds write, a case that was not judged
    mismatches: tuple[Mismatch, ...] = ()
    ratios: tuple[tuple[str, float], ...] = ()  # output -> largest observed error / bound; "out row z" -> z ...
    counts: tuple[tuple[str, int], ...] = ()  # in a mode other than eager: "replays", "recompilations" that happened

    def __bool__(self) -> bool:
        raise TypeError("a Verdict has no truth value: look at .failed or .outcome, or call .require()")

    @property
    def failed(self) -> bool:
        return self.outcome in FAILURES

    @property
    def judged(self) -> bool:
        """Whether anything is known of the case: it was neither declined nor left for lack of memory."""
        return self.outcome not in (Outcome.DECLINED, Outcome.NOT_JUDGED)

    def require(self) -> None:
        """Raise an AssertionError that says what differs, where, by how much, and how to replay it."""
        if self.failed:
            raise AssertionError(self.explain())

    def explain(self) -> str:
        """What torch.testing would say first, then where it is, what bounds it, and how to see it again."""
        lines = [f"{self.candidate}: {self.outcome.value}"]
        if self.mismatches:
            lines.insert(0, "Tensor-likes are not close!")
            lines.insert(1, "")
        if self.reason:
            lines.append(self.reason)
        for mismatch in self.mismatches:
            lines += ["", *_mismatch_lines(mismatch)]
        if self.ratios and not self.mismatches:
            lines.append("Largest error / bound: " + ", ".join(f"{name} {ratio:.3g}" for name, ratio in self.ratios))
        heading = "Replay it:" if self.target else "Replay it, with --target for this candidate as module:attribute:"
        lines += ["", heading, self.replay_line()]
        return "\n".join(lines)

    def replay_line(self) -> str:
        """A shell line that writes the case and judges the same target on it again."""
        text = " ".join(line.strip() for line in self.case.to_json().splitlines())
        return f"echo {shlex.quote(text)} > CASE.json && {replay_command('CASE.json', self.target)}"


def gravest(mismatches: tuple[Mismatch, ...]) -> Outcome:
    """The one word for several outputs: what was never written says most about its cause."""
    found = {mismatch.outcome for mismatch in mismatches}
    for outcome in (Outcome.UNWRITTEN, Outcome.POISONED, Outcome.DIFFERS):
        if outcome in found:
            return outcome
    return Outcome.AGREES


def replay_command(path: str, target: str) -> str:
    """The command that judges the case in a file; without a target, and for ours, it names none."""
    named = f" --target {shlex.quote(target)}" if target not in ("", "ours") else ""
    return f"python -m pageproof.oracle replay {shlex.quote(path)}{named}"


def _mismatch_lines(mismatch: Mismatch) -> list[str]:
    if mismatch.check in ("row z", "case z"):
        return _z_lines(mismatch)
    if not mismatch.index:
        return [f"{mismatch.output}: {mismatch.where}"]
    share = 100 * mismatch.count / mismatch.total
    lines = [
        f"{mismatch.output}: {_says(mismatch)}",
        f"Mismatched elements: {mismatch.count} / {mismatch.total} ({share:.3g}%)",
        f"Greatest absolute difference: {mismatch.greatest:.6g} at index {mismatch.greatest_index} "
        f"(up to {mismatch.greatest_bound:.3g} allowed)",
        f"Furthest outside of its bound: index {mismatch.index}, found {mismatch.actual:.9g}, "
        f"expected {mismatch.expected:.9g}",
        f"Where: {mismatch.where}",
    ]
    if mismatch.hint:
        lines.append(f"What would explain it ({mismatch.direction}): {mismatch.hint}")
    if math.isfinite(mismatch.actual) and mismatch.bound > 0:
        difference = abs(mismatch.actual - mismatch.expected)
        lines.append(
            f"Bound there: {mismatch.bound:.3g}; the difference is {difference / mismatch.bound:.3g} times that"
        )
    if mismatch.dtype and math.isfinite(mismatch.expected):
        from .bound.formats import format_of  # brings in torch, which a verdict can do without

        cast = format_of(mismatch.dtype)
        rounding = cast.roundoff * abs(mismatch.expected) + cast.underflow
        lines.append(f"The reference's own rounding to {mismatch.dtype} moves that value by at most {rounding:.3g}")
    return lines


def _says(mismatch: Mismatch) -> str:
    return _SAYS_CHECK.get(mismatch.check) or _SAYS.get(mismatch.outcome, mismatch.outcome.value)


def _z_lines(mismatch: Mismatch) -> list[str]:
    lines = [
        f"{mismatch.output}: {_says(mismatch)}",
        f"Root mean square of error / expected size: {mismatch.actual:.4g}, up to {mismatch.bound:g} allowed",
        f"Where: {mismatch.where}",
    ]
    if mismatch.index:
        lines.insert(2, f"Rows (token, query head) above that: {mismatch.count} / {mismatch.total}")
    return lines
