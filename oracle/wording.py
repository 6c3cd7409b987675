"""A verdict in words: torch.testing's familiar lines, then the place, the bound, and the line that replays it."""

from __future__ import annotations

import math
import shlex

from .bound.formats import format_of
from .verdict import Mismatch, Outcome, Verdict

_SAYS = {
    Outcome.DIFFERS: "outside of its bound",
    Outcome.POISONED: "not finite where a finite value was due: something that must not be read was",
    Outcome.UNWRITTEN: "never written: it still holds the NaN it was born with",
}


def explain(verdict: Verdict) -> str:
    """The whole message of a verdict, of any outcome."""
    lines = [f"{verdict.candidate}: {verdict.outcome.value}"]
    if verdict.mismatches:
        lines.insert(0, "Tensor-likes are not close!")
        lines.insert(1, "")
    if verdict.reason:
        lines.append(verdict.reason)
    for mismatch in verdict.mismatches:
        lines += ["", *_mismatch_lines(mismatch)]
    if verdict.ratios and not verdict.mismatches:
        lines.append("Largest error / bound: " + ", ".join(f"{name} {ratio:.3g}" for name, ratio in verdict.ratios))
    lines += ["", "Replay it:", replay_line(verdict)]
    return "\n".join(lines)


def replay_line(verdict: Verdict) -> str:
    """A shell line that writes the case and judges the same candidate on it again."""
    text = " ".join(line.strip() for line in verdict.case.to_json().splitlines())
    target = f" --target {shlex.quote(verdict.candidate)}"
    return f"echo {shlex.quote(text)} > CASE.json && python -m pageproof.oracle replay CASE.json{target}"


def _mismatch_lines(mismatch: Mismatch) -> list[str]:
    if not mismatch.index:
        return [f"{mismatch.output}: {mismatch.where}"]
    share = 100 * mismatch.count / mismatch.total
    lines = [
        f"{mismatch.output}: {_SAYS.get(mismatch.outcome, mismatch.outcome.value)}",
        f"Mismatched elements: {mismatch.count} / {mismatch.total} ({share:.3g}%)",
        f"Greatest absolute difference: {mismatch.greatest:.6g} at index {mismatch.greatest_index} "
        f"(up to {mismatch.greatest_bound:.3g} allowed)",
        f"Furthest outside of its bound: index {mismatch.index}, found {mismatch.actual:.9g}, "
        f"expected {mismatch.expected:.9g}",
        f"Where: {mismatch.where}",
    ]
    if math.isfinite(mismatch.actual) and mismatch.bound > 0:
        difference = abs(mismatch.actual - mismatch.expected)
        lines.append(
            f"Bound there: {mismatch.bound:.3g}; the difference is {difference / mismatch.bound:.3g} times that"
        )
    if mismatch.dtype and math.isfinite(mismatch.expected):
        cast = format_of(mismatch.dtype)
        rounding = cast.roundoff * abs(mismatch.expected) + cast.underflow
        lines.append(f"The reference's own rounding to {mismatch.dtype} moves that value by at most {rounding:.3g}")
    return lines
