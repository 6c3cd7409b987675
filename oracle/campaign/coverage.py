"""What a campaign's cases covered: the lines that close it, and the part of its JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .pairs import describe
from .parameters import BY_NAME
from .summary import Summary
from .tally import Tally

SHOWN_VALUES = 16  # of a kind, those with the most cases
SHOWN_MISSING = 3
_SHOWN = (
    *("operation", "dtype", "float8", "cache_layout", "block_size", "head_size", "group_size", "recipe", "check"),
    "mode",
)


def lines(summary: Summary) -> str:
    """Values by name with their cases, then pairs, triples, events, compile keys and plans, each k of m."""
    tally = summary.tally
    if not tally.cases:
        return ""
    by_name = _values(tally)
    shown = [f"{name}: {_spoken(by_name[name])}" for name in _SHOWN if name in by_name]
    counts = [
        _modes_line(tally),
        _missing_line(summary),
        _triples_line(summary),
        _events_line(summary),
        _keys_line(tally),
    ]
    return "\n".join(["cases (in brackets) with each value:", *shown, *filter(None, [*counts, _plans_line(tally)])])


def body(summary: Summary) -> dict[str, Any]:
    """The same and all of it, for programs."""
    tally, reachable = summary.tally, summary.reachable
    missing_pairs = reachable.missing_pairs(tally.events)
    return {
        "pairs": {
            "covered": summary.pairs_covered,
            "feasible": len(summary.feasible),
            "rows": summary.rows,
            "missing": sorted(describe(pair) for pair in summary.pairs_missing),
        },
        "modes": {mode: {"cases": tally.values["mode", mode], **_ran(tally, mode)} for mode in summary.modes},
        "triples": {"covered": summary.triples_covered, "feasible": len(summary.feasible_triples)},
        "values": {name: dict(counts.most_common()) for name, counts in _values(tally).items()},
        "features": {
            name: {str(value): tally.features[name, value] for value in parameter.values}
            for name, parameter in BY_NAME.items()
        },
        "events": {
            "covered": len(reachable.events) - len(reachable.missing_events(tally.events)),
            "reachable": len(reachable.events),
            "cases": {name: tally.events.cases[name] for name in reachable.events},
        },
        "event_pairs": {
            "covered": reachable.num_pairs - len(missing_pairs),
            "reachable": reachable.num_pairs,
            "missing": [list(pair) for pair in missing_pairs],
        },
        "compile_keys": {"all": len(tally.keys), "by_operation": dict(_keys_by_operation(tally))},
        "plans": {
            "distinct": len(tally.plans),
            "cases": {name: dict(sorted(bins.items())) for name, bins in _plan_bins(tally).items()},
        },
    }


def _values(tally: Tally) -> dict[str, Counter[str]]:
    """What -> value -> cases; a float8 tensor goes by its letter."""
    by_name: dict[str, Counter[str]] = {}
    for (name, value), cases in tally.values.items():
        kind, value = ("float8", name.removesuffix("_dtype")) if name.endswith("_dtype") else (name, str(value))
        by_name.setdefault(kind, Counter())[value] += cases
    return by_name


def _spoken(counts: Counter[str]) -> str:
    shown = counts.most_common(SHOWN_VALUES)
    rest = [f"{len(counts) - len(shown)} more"] if len(counts) > len(shown) else []
    if len(counts) == len(shown) and all(value.isdigit() for value in counts):
        shown.sort(key=lambda item: int(item[0]))
    return ", ".join([*(f"{value} ({cases:,})" for value, cases in shown), *rest])


def _missing_line(summary: Summary) -> str:
    missing = [pair for pair in summary.pairs_missing if not pair & summary.banned]  # those cannot be covered
    if not missing:
        return ""
    examples = ", ".join(f"({pair})" for pair in sorted(map(describe, missing))[:SHOWN_MISSING])
    return f"NOT ALL PAIRS of features were covered: {len(missing):,} are missing, such as {examples}"


def _ran(tally: Tally, mode: str) -> dict[str, int]:
    return {what: times for (name, what), times in sorted(tally.ran.items()) if name == mode}


def _modes_line(tally: Tally) -> str:
    """What was really replayed, and compiled again."""
    ran = [f"{mode} {times:,} {what}" for (mode, what), times in sorted(tally.ran.items())]
    return f"modes, what really ran: {', '.join(ran)}" if ran else ""


def _triples_line(summary: Summary) -> str:
    feasible = len(summary.feasible_triples)
    return f"triples of features {summary.triples_covered:,}/{feasible:,}" if feasible else ""


def _events_line(summary: Summary) -> str:
    tally, reachable = summary.tally, summary.reachable
    missing = reachable.missing_events(tally.events)
    more = f" and {len(missing) - SHOWN_MISSING} more" if len(missing) > SHOWN_MISSING else ""
    without = f"; no case with {', '.join(missing[:SHOWN_MISSING])}{more}" if missing else ""
    pairs = reachable.num_pairs - len(reachable.missing_pairs(tally.events))
    events = len(reachable.events)
    of_two = f"pairs of them in one request {pairs:,}/{reachable.num_pairs:,}"
    return f"boundary events {events - len(missing)}/{events}, {of_two}{without}"


def _keys_line(tally: Tally) -> str:
    return f"compile keys: {_spoken(_keys_by_operation(tally))}"


def _keys_by_operation(tally: Tally) -> Counter[str]:
    return Counter(spec.operation for spec in tally.keys)


def _plans_line(tally: Tally) -> str:
    """How many different plans, and in how many cases each of their counts was not 0."""
    if not tally.plans:
        return ""
    some = {name: sum(cases for digits, cases in bins.items() if digits) for name, bins in _plan_bins(tally).items()}
    named = ", ".join(f"{name} ({cases:,})" for name, cases in some.items() if name != "split_keys")
    return f"launch plans: {len(tally.plans):,} distinct, with {named}"


def _plan_bins(tally: Tally) -> dict[str, Counter[int]]:
    """Name -> binary digits of its count, keys of a split as they are -> cases."""
    found: dict[str, Counter[int]] = {}
    for plan, cases in tally.plans.items():
        for name, digits in plan:
            found.setdefault(name, Counter())[digits] += cases
    return found
