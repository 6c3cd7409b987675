"""A campaign's summary in words and as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from ..case import Case
from . import coverage
from .pairs import Trait
from .parameters import BY_NAME, Value
from .spread import quantile
from .summary import Summary
from .tally import Tally, median

SCHEMA = 2
SHOWN_FINDINGS = 20
SHOWN_REASONS = 5
RATIOS = ("out", "lse", "out sub-gaussian", "lse sub-gaussian", "out row z", "out case z")  # as compare names them
QUANTILES = {"median": 0.5, "99%": 0.99, "99.9%": 0.999}


def opening(summary: Summary) -> str:
    """What runs where, before it does."""
    options = summary.options
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    limit = f", at most {options.cases:,} cases" if options.cases is not None else ""
    asked = f"{options.target} on {summary.device}, seed {options.seed}, {options.seconds:g} s{limit}"
    return f"fuzz: {asked}; {summary.workers} worker{'s' if summary.workers != 1 else ''}\n{versions}"


def modes_line(summary: Summary) -> str:
    """In which modes cases are drawn, and in which not, though they were asked for; known once the rows are."""
    missing = [mode for mode in summary.options.modes if mode not in summary.modes]
    lacking = f"; {summary.candidate} does not offer {', '.join(missing)}" if missing else ""
    return f"modes: {', '.join(summary.modes)}{lacking}"


def status(summary: Summary) -> str:
    """One line while it runs."""
    tally = summary.tally
    return (
        f"{summary.seconds:.0f} s: {tally.cases:,} cases, {summary.rate:.1f}/s; {_worst(tally)}; {_pairs(summary)}; "
        f"{len(tally.keys):,} compile keys; {_findings(summary)}"
        + (f"; {summary.trials:,} smaller cases tried" if summary.trials else "")
    )


def closing(summary: Summary) -> str:
    """The findings, what was left out, the largest ratios, what was covered, and last the line that counts."""
    left_out = _declined_lines(summary), _not_judged_lines(summary.tally)
    blocks = [
        _finding_lines(summary),
        summary.past.line(),
        *left_out,
        _ratio_table(summary.tally),
        coverage.lines(summary),
        closing_line(summary),
    ]
    return "\n\n".join(block for block in blocks if block)


def closing_line(summary: Summary) -> str:
    tally = summary.tally
    steady = "" if summary.steady_rate is None else f" ({summary.steady_rate:.1f}/s after the pairs)"
    parts = [
        f"{tally.cases:,} cases, {_findings(summary)}, {summary.seconds:.1f} s, {summary.rate:.1f} cases/s{steady}",
        f"median {median(tally.tokens):,} tokens, {median(tally.visible):,} keys, {tally.long_share:.0%} >= 1024 keys",
        f"{len(tally.keys):,} compile keys",
        _pairs(summary),
        _worst(tally),
    ]
    if tally.declined:
        parts.append(f"{sum(tally.declined.values()):,} more declined")
    if tally.not_judged:
        parts.append(f"{sum(tally.not_judged.values()):,} more not judged")
    if summary.abandoned:
        parts.append(f"{summary.abandoned:,} groups left after repeated deaths of workers")
    return "; ".join(parts) + (" (interrupted)" if summary.interrupted else "")


def _findings(summary: Summary) -> str:
    found, failures = len(summary.findings), summary.findings.failures
    of = f" ({failures:,} cases)" if failures > found else ""
    return f"{found:,} finding{'s' if found != 1 else ''}{of}"


def _pairs(summary: Summary) -> str:
    return f"pairs {summary.pairs_covered:,}/{len(summary.feasible):,}"


def _worst(tally: Tally) -> str:
    (out, label), (lse, _) = tally.worst_of("out"), tally.worst_of("lse")
    return f"worst observed/bound out {out:.2f}{f' ({label})' if label else ''} lse {lse:.2f}"


def _finding_lines(summary: Summary) -> str:
    ordered = sorted(summary.findings, key=lambda finding: finding.failure.size)
    target = summary.options.target
    lines = [finding.line(target) for finding in ordered]
    more = [f"... and {len(lines) - SHOWN_FINDINGS:,} more in {summary.options.findings}"]
    return "\n".join(lines[:SHOWN_FINDINGS] + more * (len(lines) > SHOWN_FINDINGS))


def _declined_lines(summary: Summary) -> str:
    declined = summary.tally.declined
    lines = [
        f"declined, and so not verified: {count:,} x {reason}" for reason, count in declined.most_common(SHOWN_REASONS)
    ]
    if summary.banned:
        lines.append(f"never accepted, and so left out: {_banned(summary.banned)}")
    return "\n".join(lines)


def _banned(traits: Collection[Trait]) -> str:
    """By parameter; of one that never applies, because no operation with it was accepted, only the name."""
    by_name: dict[str, list[Value]] = {}
    for name, value in sorted(traits, key=str):
        by_name.setdefault(name, []).append(value)
    spoken = []
    for name, values in by_name.items():
        parameter = BY_NAME[name]
        every = set(values) == {*parameter.values, *parameter.extra}
        spoken.append(f"{name} (all)" if every else f"{name}={'|'.join(map(str, values))}")
    return ", ".join(spoken)


def _not_judged_lines(tally: Tally) -> str:
    return "\n".join(f"not judged: {count:,} x {reason}" for reason, count in tally.not_judged.most_common())


def _ratio_table(tally: Tally) -> str:
    labels = sorted({label for label, output in tally.worst if output in ("out", "lse")})
    if not labels:
        return ""
    shown = [output for output in RATIOS if any(label[1] == output for label in tally.worst)]
    rows: list[tuple[str, ...]] = [("largest observed/bound", *shown)]
    for label in labels:
        ratios = (tally.worst.get((label, output)) for output in shown)
        rows.append((label, *("-" if found is None else f"{found[0]:.3f}" for found in ratios)))
    widths = [max(6, *map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def spread(tally: Tally) -> list[dict[str, Any]]:
    """Of each output and number formats: cases that agreed, and quantiles of each case's largest ratio."""
    found = []
    for (label, output), bins in sorted(tally.spread.items(), key=lambda item: item[0]):
        largest = tally.worst[label, output][0]
        quantiles = {name: min(largest, quantile(bins, share)) for name, share in QUANTILES.items()}
        cases = sum(bins.values())
        found.append({"formats": label, "output": output, "cases": cases, **quantiles, "largest": largest})
    return found


def to_json(summary: Summary) -> str:
    """Everything in the summary, for other programs; finite numbers only."""
    return json.dumps(_body(summary), indent=2, allow_nan=False) + "\n"


def _body(summary: Summary) -> dict[str, Any]:
    options, tally = summary.options, summary.tally
    return {
        "schema": SCHEMA,
        "target": options.target,
        "seed": options.seed,
        "device": summary.device,
        "workers": summary.workers,
        "versions": summary.versions,
        "notes": list(summary.notes),
        "interrupted": summary.interrupted,
        "seconds": summary.seconds,
        "cases": tally.cases,
        "cases_per_second": summary.rate,
        "steady_cases_per_second": summary.steady_rate,
        "outcomes": dict(tally.outcomes),
        "median_tokens": median(tally.tokens),
        "median_keys": median(tally.visible),
        "share_of_1024_keys": tally.long_share,
        "never_accepted": sorted([name, value] for name, value in map(_texts, summary.banned)),
        "declined": dict(tally.declined.most_common()),
        "not_judged": dict(tally.not_judged.most_common()),
        "abandoned_groups": summary.abandoned,
        **coverage.body(summary),
        "past": {
            "failing": [str(path) for path in summary.past.failing],
            "passing": [str(path) for path in summary.past.passing],
            "left_out": [str(path) for path in summary.past.left_out],
        },
        "worst": [
            {"formats": label, "output": output, "ratio": ratio, "case": _case(case)}
            for (label, output), (ratio, case) in sorted(tally.worst.items(), key=lambda item: item[0])
        ],
        "spread": spread(tally),
        "findings": [
            {
                **finding.failure.symptom._asdict(),
                "features": sorted(finding.failure.features),
                "stage": finding.stage.value,
                "cases": finding.count,
                "file": str(finding.path) if finding.path else None,
                "case": _case(finding.failure.case),
            }
            for finding in sorted(summary.findings, key=lambda finding: finding.failure.size)
        ],
    }


def _texts(trait: tuple[str, object]) -> tuple[str, str]:
    return trait[0], str(trait[1])


def _case(case: Case) -> Any:
    return json.loads(case.to_json())
